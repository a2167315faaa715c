"""The weights that a new run starts from."""

import time
from pathlib import Path

from tidar.config import Config, UserError
from tidar.models import Decoder, initialize
from tidar.models.huggingface import ModelSpec, StepFolder, Weights, fill_new_rows, load_weights, open_weights
from tidar.models.huggingface.manifest import check_whole


def check_first_weights(config: Config) -> None:
    """Raises UserError where checkpoint.initial_load_path is a checkpoint's folder that is not whole."""
    path = config.checkpoint.initial_load_path
    if path and isinstance(open_first_weights(config), StepFolder):
        check_whole(Path(path), f"checkpoint.initial_load_path = {path}")


def open_first_weights(config: Config) -> Weights | None:
    """The weights of checkpoint.initial_load_path or else model.hf_path; None where these name or hold none."""
    path, option = config.checkpoint.initial_load_path, "checkpoint.initial_load_path"
    if not path:
        path, option = config.model.hf_path, "model.hf_path"
    return open_weights(path, option) if path else None


def set_first_weights(model: Decoder, spec: ModelSpec, config: Config) -> list[str]:
    """Loads the weights of checkpoint.initial_load_path or else model.hf_path, or initializes them at random.

    Returns what to log about them. Raises UserError for weights that are not the model's, and where initial_load_path
    holds none.
    """
    path = config.checkpoint.initial_load_path or config.model.hf_path
    weights = open_first_weights(config)
    if weights is None and config.checkpoint.initial_load_path:
        raise UserError(f"checkpoint.initial_load_path = {path}: holds no weights")
    if weights is None:
        initialize(model, config.training.seed)
        warning = [f"warning: {path} holds no weights"] if path else []
        return [*warning, f"starts from random weights; the mask token is {spec.mask_token_id}"]
    started = time.perf_counter()
    loaded_rows = load_weights(model, weights, spec.vocab_size_before)
    keeps = {"auto": spec.mask_row_is_trained, "keep": True, "mean": False}[config.tidar.mask_token_init]
    fill_new_rows(model, spec, loaded_rows, mask_row=not keeps)
    lines = [f"starts from the weights of {path}, loaded in {time.perf_counter() - started:.1f} s"]
    if loaded_rows < spec.decoder.vocab_size:
        lines.append(f"the vocabulary grows from {loaded_rows} to {spec.decoder.vocab_size} rows")
    keeps = keeps and spec.mask_token_id < loaded_rows
    row = "kept" if keeps else f"the mean of the {spec.used_rows:,} used rows"
    lines += _method_changes(spec, config)
    return [*lines, f"the mask token is {spec.mask_token_id}; its embedding is {row}"]


def _method_changes(spec: ModelSpec, config: Config) -> list[str]:
    """What the first weights were trained with, where that differs from the run's options."""
    now = {
        "pattern": config.tidar.pattern,
        "block_size": config.tidar.block_size,
        "mask_token_id": spec.mask_token_id,
    }
    before = now | spec.trained_with
    changes = [f"tidar.{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    return [f"these weights were trained with other options: {'; '.join(changes)}"] if changes else []
