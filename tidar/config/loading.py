"""From a TOML file and the command line to a checked Config, and back to TOML. Needs no torch: it answers at once."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any

from tidar.config.errors import UserError
from tidar.config.options import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_config(args: list[str], prog: str = "python -m tidar.train") -> Config:
    """Options of the TOML file named by --job.config_file, overridden by the command line, checked.

    `--help` prints every option and exits. The config.toml in a run's folder belongs to the run in that folder, even
    where the folder was moved. Raises UserError, naming the option, the value and what is allowed.
    """
    config = Config()
    given, leftover = _parser(prog).parse_known_args(_join_negative_numbers(args))
    if leftover:
        raise UserError(_unknown_argument(leftover[0]))
    overrides = {name: value for name, value in vars(given).items() if value is not None}
    config.job.config_file = overrides.pop("job.config_file", "")
    if config.job.config_file:
        _apply_file(config, config.job.config_file)
    for name, text in overrides.items():
        set_option(config, name, text, origin="", from_text=True)
    if "job.dump_folder" not in overrides and _is_moved_run(config):
        config.job.dump_folder = str(Path(config.job.config_file).parent)
    if not config.job.dump_folder:
        config.job.dump_folder = os.path.join("runs", Path(config.job.config_file or "default").stem)
    _check_together(config)
    return config


def to_toml(config: Config) -> str:
    """The options as a TOML file that `load_config` reads back to the same Config."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            if name != "config_file":
                # JSON's strings, numbers, booleans and lists are TOML's too, but for the character DEL
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
        lines.append("")
    return "\n".join(lines)


def resolve_global_batch_size(config: Config, dp_size: int) -> int:
    """Rows of an optimizer step. dp_size: ranks that have rows of their own.

    Raises UserError for a number that is no multiple of a micro-batch on each of them.
    """
    micro_batch = config.training.local_batch_size * dp_size
    rows = config.training.global_batch_size
    if rows == -1:
        return micro_batch
    if rows % micro_batch != 0:
        options = config.parallelism
        shares = max(options.context_parallel_degree, options.tensor_parallel_degree) > 1
        ranks = "data-parallel ranks" if shares else "devices"
        raise UserError(
            f"training.global_batch_size = {rows}: must be a multiple of {micro_batch} "
            f"(training.local_batch_size = {config.training.local_batch_size} on each of {dp_size} {ranks}), or -1"
        )
    return rows


def resolve_micro_batches(config: Config, dp_size: int) -> int:
    """Micro-batches of each rank in an optimizer step. Raises UserError as `resolve_global_batch_size` does."""
    return resolve_global_batch_size(config, dp_size) // (config.training.local_batch_size * dp_size)


def make_dump_folder(config: Config) -> Path:
    """Creates job.dump_folder. Raises UserError where nothing can be written there."""
    folder = Path(config.job.dump_folder)
    try:
        str(folder).encode()  # files name it in UTF-8
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a disk may be full")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"job.dump_folder = {format_value(str(folder))}: cannot be written ({reason})") from None
    return folder


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message: str):
        raise UserError(message)


def _join_negative_numbers(args: list[str]) -> list[str]:
    """--name -1e-3 as --name=-1e-3: argparse takes some negative numbers for options."""
    joined: list[str] = []
    for argument in args:
        if joined and joined[-1].startswith("--") and re.match(r"-\.?\d", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--job.config_file FILE] [--section.option value ...]",
        description="Every option can stand in the TOML file, under its section, or on the command line, which wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=48, width=118),
    )
    for section in dataclasses.fields(Config):
        kind: Any = section.type
        group = parser.add_argument_group(f"[{section.name}] {kind.__doc__.rstrip('.')}")
        values = kind()
        for field in dataclasses.fields(kind):
            default = getattr(values, field.name)
            text = field.metadata["help"] + ("" if default == "" else f" [{format_value(default)}]")
            arguments: dict[str, Any] = {"metavar": describe_allowed(field), "help": text.replace("%", "%%")}
            if field.type is bool:
                arguments |= {"nargs": "?", "const": "true"}
            elif typing.get_origin(field.type) is list:
                arguments |= {"nargs": "*"}
            group.add_argument(f"--{section.name}.{field.name}", **arguments)
    return parser


def _apply_file(config: Config, path: str) -> None:
    try:
        with open(path, encoding="utf-8-sig") as file:
            sections = tomllib.loads(file.read())
    except OSError as error:
        raise UserError(f"job.config_file = {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: is not TOML that can be read: it is nested too deeply") from None
    for section, options in sections.items():
        if section not in vars(config):
            raise UserError(f"{path}: unknown section [{section}]{_nearest(section, vars(config))}")
        if not isinstance(options, dict):
            raise UserError(f"{path}: {section} = {_quote(options)}: must be a section, [{section}]")
        for name, value in options.items():
            set_option(config, f"{section}.{name}", value, origin=f"{path}: ")


def _is_moved_run(config: Config) -> bool:
    """Whether the config file lies in the folder of a run, but names another one: the folder was moved or copied."""
    path = Path(config.job.config_file)
    if path.name != "config.toml" or not config.job.dump_folder:
        return False
    folder = path.parent
    holds_run = (folder / "outcome.json").exists() or any(folder.glob("checkpoint/step-*"))
    return holds_run and os.path.realpath(folder) != os.path.realpath(config.job.dump_folder)


def set_option(config: Config, full_name: str, value: Any, origin: str, from_text: bool = False) -> None:
    """Sets an option by its name, section.option. Raises UserError, with `origin` before it, for what is not allowed.

    from_text: the value is one of the command line's.
    """
    section, _, name = full_name.partition(".")
    options = getattr(config, section)
    fields = {field.name: field for field in dataclasses.fields(options)}
    if full_name == "job.config_file":
        raise UserError(f"{origin}{full_name}: is given on the command line only")
    if name not in fields:
        raise UserError(f"{origin}unknown option {full_name}{_nearest(full_name, _all_names())}")
    field = fields[name]
    shown = format_value(value) if from_text else _quote(value)
    if from_text:
        value = _from_text(value, field.type)
    if field.type is float and type(value) is int:
        value = float(value)
    if field.type == list[float] and isinstance(value, list):
        value = [float(item) if type(item) is int else item for item in value]
    if not _is_allowed(value, field):
        raise UserError(f"{origin}{full_name} = {shown}: must be {describe_allowed(field)}")
    setattr(options, name, value)


def _from_text(text: Any, kind: Any) -> Any:
    """The value that a command-line argument stands for, or the text itself, which is then refused with its name."""
    try:
        if kind in (int, float):
            return kind(text)
        if kind == list[float]:
            return [float(item) for item in text]
        if kind == list[int]:
            return [int(item) for item in text]
    except ValueError:
        return text
    if kind is bool or typing.get_origin(kind) is typing.Literal:
        return {"true": True, "false": False}.get(text, text)
    return text


def _is_allowed(value: Any, field: dataclasses.Field) -> bool:
    if typing.get_origin(field.type) is typing.Literal:
        # `in` would take 1 for True
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(field.type))
    if typing.get_origin(field.type) is list:
        (kind,) = typing.get_args(field.type)
        return isinstance(value, list) and all(type(item) is kind and _in_bounds(item, field) for item in value)
    return type(value) is field.type and _in_bounds(value, field)


def _in_bounds(value: Any, field: dataclasses.Field) -> bool:
    minimum, maximum, above, below = (field.metadata[bound] for bound in ("minimum", "maximum", "above", "below"))
    if field.metadata["also"] is not None and value == field.metadata["also"]:
        return True
    return (
        (type(value) is not float or math.isfinite(value))
        and (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def describe_allowed(field: dataclasses.Field) -> str:
    if typing.get_origin(field.type) is typing.Literal:
        return "|".join(format_value(choice) for choice in typing.get_args(field.type))
    kinds: dict[Any, str] = {
        int: "integer",
        float: "number",
        bool: "true|false",
        str: "text",
        list[float]: "list of numbers",
        list[int]: "list of integers",
    }
    words = kinds.get(field.type, "list of texts")
    minimum, maximum, above, below = (field.metadata[bound] for bound in ("minimum", "maximum", "above", "below"))
    if above is not None:
        words += f" > {above}"
        words += f" and < {below}" if below is not None else ""
        words += f" and <= {maximum}" if maximum is not None else ""
    if minimum is not None:
        words += f" {in_range(minimum, maximum)}"
    if field.metadata["also"] is not None:
        words += f", or {field.metadata['also']}"
    return words


def in_range(minimum: float, maximum: float | None) -> str:
    """A range, for a message."""
    return f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"


def _quote(value: Any) -> str:
    """The value as in a TOML file, on one line."""
    return json.dumps(value, default=str, ensure_ascii=False)


def format_value(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else _quote(value)


def _all_names() -> list[str]:
    return [f"{section}.{name}" for section, options in vars(Config()).items() for name in vars(options)]


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    same_option = [other for other in known if "." in name and other.split(".")[-1] == name.split(".")[-1]]
    if same_option or match:
        return f"; did you mean {(same_option or match)[0]}?"
    return f"; known: {', '.join(known)}" if "." not in name else "; --help lists them all"


def _unknown_argument(argument: str) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {argument}: options are given as --section.option value"
    name = argument[2:].split("=")[0]
    return f"unknown option {name}{_nearest(name if '.' in name else '.' + name, _all_names())}"


def _check_together(config: Config) -> None:
    block_size, seq_len = config.tidar.block_size, config.training.seq_len
    if block_size > seq_len:
        raise UserError(f"tidar.block_size = {block_size}: must be at most training.seq_len = {seq_len}")
    if max(config.tidar.block_sizes, default=0) > seq_len:
        raise UserError(f"tidar.block_sizes = {config.tidar.block_sizes}: must be at most training.seq_len = {seq_len}")
    if config.tidar.ar_loss_weight + config.tidar.diffusion_loss_weight == 0:
        raise UserError("tidar.ar_loss_weight = tidar.diffusion_loss_weight = 0: one of them must be above 0")
    parallelism = config.parallelism
    if parallelism.gradient_reduction == "step" and parallelism.fsdp_reshard_after_forward == "always":
        raise UserError(
            "parallelism.gradient_reduction = step: keeps whole gradients on every device: must be micro_batch where "
            "parallelism.fsdp_reshard_after_forward = always, which saves that memory"
        )
    scheduler = config.lr_scheduler
    if scheduler.schedule == "warmup" and -1 < scheduler.total_steps < scheduler.warmup_steps:
        raise UserError(
            f"lr_scheduler.total_steps = {scheduler.total_steps}: must be at least "
            f"lr_scheduler.warmup_steps = {scheduler.warmup_steps}, or -1"
        )
    if config.loss_scale.dynamic and config.loss_scale.start < config.loss_scale.minimum:
        raise UserError(
            f"loss_scale.start = {config.loss_scale.start}: must be at least "
            f"loss_scale.minimum = {config.loss_scale.minimum}"
        )
