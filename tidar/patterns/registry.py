"""Patterns by name: the built-in ones, and a user's own as "my_package.my_file:MyPattern"."""

import importlib
import inspect
import os
import sys
from typing import TypeGuard

from tidar.config import Config, UserError, named_error
from tidar.patterns.base import Pattern
from tidar.patterns.block_diffusion import BlockDiffusion
from tidar.patterns.causal import Causal
from tidar.patterns.checks import check_pattern
from tidar.patterns.tidar import Tidar
from tidar.patterns.tidar_random import TidarRandom
from tidar.patterns.tidar_split import TidarSplit

PATTERNS: dict[str, type[Pattern]] = {
    "tidar": Tidar,
    "tidar_split": TidarSplit,
    "tidar_random": TidarRandom,
    "block_diffusion": BlockDiffusion,
    "causal": Causal,
}
# patterns whose masked blocks see the clean tokens before them and themselves, as a step of decoding has it
DECODABLE = ("tidar", "tidar_random", "tidar_split")
# options of [tidar] that only training uses: validation measures what inference does
EXPERIMENTS = ("block_sizes", "random_block_offset", "place_weights", "diffusion_share")


def get_pattern(name: str, **options) -> Pattern:
    """The pattern `name` with these options. Raises UserError for an unknown name, or where it cannot be loaded."""
    return find_pattern(name)(**options)


def find_pattern(name: str) -> type[Pattern]:
    """The class of the pattern `name`. Raises UserError as `get_pattern` does."""
    if ":" in name:
        return _load(name)
    if name not in PATTERNS:
        raise UserError(
            f"tidar.pattern = {name}: must be one of {', '.join(PATTERNS)}, or your own: my_package.my_file:MyPattern"
        )
    return PATTERNS[name]


def configured_pattern(config: Config, mask_token_id: int, training: bool = True) -> Pattern:
    """The pattern that the options of [tidar] describe. training: whether the options of EXPERIMENTS apply.

    Raises UserError as `get_pattern` does, and for an experiment that the pattern does not have as a parameter.
    """
    options = config.tidar
    kind = find_pattern(options.pattern)
    accepted = inspect.signature(kind).parameters
    values = vars(options) | {"mask_token_id": mask_token_id}
    for name in experiments(config):
        if name not in accepted:
            raise UserError(f"tidar.{name} = {values[name]}: is no option of tidar.pattern = {options.pattern}")
        if not training:
            values[name] = getattr(Config().tidar, name)
    try:
        return kind(**{name: value for name, value in values.items() if name in accepted})
    except TypeError as error:
        raise UserError(f"tidar.pattern = {options.pattern}: cannot be created: {error}") from None


def checked_pattern(config: Config, mask_token_id: int) -> Pattern:
    """The pattern to train with. Raises UserError as `configured_pattern` and `check_pattern` do."""
    pattern = configured_pattern(config, mask_token_id)
    check_pattern(pattern, config.tidar.pattern, config.training.seq_len)
    return pattern


def loss_weights(config: Config, pattern: Pattern) -> dict[str, float]:
    """Weight of each loss of the pattern. Raises UserError where all are 0."""
    weights = {loss: getattr(config.tidar, f"{loss}_loss_weight") for loss in pattern.losses}
    if not any(weights.values()):
        names = " = ".join(f"tidar.{loss}_loss_weight" for loss in weights)
        raise UserError(f"{names} = 0: must be above 0, as pattern {config.tidar.pattern} has no other loss")
    return weights


def experiments(config: Config) -> dict[str, object]:
    """The options of EXPERIMENTS that differ from their defaults: name, value."""
    default = Config().tidar
    values = {name: getattr(config.tidar, name) for name in EXPERIMENTS}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _load(name: str) -> type[Pattern]:
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's file may raise anything
        raise UserError(
            f"tidar.pattern = {name}: {module_name or 'a module without a name'} cannot be imported "
            f"({named_error(error)})",
            "it must be a Python module of the current folder or of PYTHONPATH: my_package.my_file:MyPattern",
        ) from None
    kind = getattr(module, class_name, None)
    if not _is_pattern(kind):
        found = [key for key, value in vars(module).items() if _is_pattern(value)]
        raise UserError(
            f"tidar.pattern = {name}: {module_name} has no subclass of tidar.patterns.Pattern with that name"
            f"; it has {', '.join(found) or 'none'}"
        )
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"tidar.pattern = {name}: must define {', '.join(missing)}")
    return kind


def _is_pattern(value: object) -> TypeGuard[type[Pattern]]:
    return inspect.isclass(value) and issubclass(value, Pattern) and value is not Pattern
