"""Exports a checkpoint to a Hugging Face folder: python -m tidar.export --checkpoint RUN/checkpoint/step-N --output DIR

The folder loads in plain transformers as the ordinary Qwen model, which is TiDAR's autoregressive mode; with
trust_remote_code=True, its generate() is TiDAR. Needs no GPU and little memory: it reads the weights a few rows at a
time. --list RUN lists a run's checkpoints and which are whole.
"""

import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tidar.config import ArgumentParser, UserError, print_lines, user_errors_exit
from tidar.models import Decoder
from tidar.models.huggingface import (
    ASSETS,
    StepFolder,
    check_weights,
    decoder_config,
    published_ranges,
    published_shapes,
    read_config_json,
    read_metadata,
    without_generate,
    write_huggingface_folder,
)
from tidar.models.huggingface.manifest import check_whole, find_problem, read_manifest, saved_steps
from tidar.training.reporting.metrics import validation_figures


def export(checkpoint: Path, output: Path, dtype: torch.dtype) -> None:
    """Writes the model of a checkpoint's step-<n> to `output`.

    Raises UserError if the checkpoint is not whole, or `output` exists and is not an empty folder.
    """
    if not (checkpoint / ".metadata").is_file() or not (checkpoint / ASSETS).is_dir():
        steps = [] if checkpoint.exists() else saved_steps(checkpoint.parent.parent)
        there = f"; that run has those of the steps {', '.join(map(str, steps))}" if steps else ""
        raise UserError(f"--checkpoint {checkpoint}: must be a checkpoint of a run: RUN/checkpoint/step-<n>{there}")
    check_whole(checkpoint, f"--checkpoint {checkpoint}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder")
    with torch.device("meta"):
        model = Decoder(decoder_config(read_config_json(checkpoint / ASSETS), str(checkpoint / ASSETS / "config.json")))
    weights = StepFolder(checkpoint)
    check_weights(weights, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parts = published_ranges(shapes, model.config)
    step, figures = _validation(checkpoint)
    try:
        write_huggingface_folder(
            output,
            published_shapes(shapes, model.config),
            dtype,
            lambda name: weights.published_pieces(parts[name]),
            lambda folder: shutil.copytree(checkpoint / ASSETS, folder),
            step=step,
            figures=figures,
        )
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None


def _validation(checkpoint: Path) -> tuple[int | None, dict[str, float]]:
    """The step of a checkpoint, and what its run's validation has measured then; none where it lies in no run."""
    path = checkpoint.absolute()
    number = re.fullmatch("step-([0-9]+)", path.name)
    if not number:
        return None, {}
    step, lies_in_a_run = int(number[1]), path.parent.name == "checkpoint"
    return step, validation_figures(path.parents[1], step) if lies_in_a_run else {}


def list_checkpoints(run: Path) -> list[str]:
    """A line for each checkpoint of a run: step, size, whether it is whole, its content. Reads all of their files.

    Raises UserError if there is none.
    """
    steps = saved_steps(run)
    if not steps:
        raise UserError(f"--list {run}: holds no checkpoint/step-<n>; must be a run's job.dump_folder")
    lines = []
    for step, path in steps.items():
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30
        except FileNotFoundError:
            continue  # the run, still running, has removed it
        problem = find_problem(path)
        try:
            about = read_manifest(path)["about"]
        except ValueError:
            about = {}
        whole = f"NOT WHOLE: {problem}" if problem else "whole"
        lines.append("  ".join([f"step {step:>8}", f"{size:9.3f} GiB", whole, *_contents(path, about)]))
    return lines


def _contents(step: Path, about: dict[str, Any]) -> list[str]:
    """Metadata of a checkpoint and the number of values of its tensors, as far as they can be read."""
    known = [str(about["saved"])] if "saved" in about else []
    known += [f"{about[name]:,} {name}" for name in ("samples", "tokens") if name in about]
    known += [f"val/loss {about['val_loss']:.4f}"] if about.get("val_loss") is not None else []
    try:
        tensors: dict[str, Any] = read_metadata(step).state_dict_metadata
    except UserError:
        return known
    counts: dict[tuple[str, str], int] = {}
    for name, saved in tensors.items():
        part = name.partition(".")[0]
        if part in ("model", "optimizer") and saved.size:
            kind = (part, str(saved.properties.dtype).removeprefix("torch."))
            counts[kind] = counts.get(kind, 0) + math.prod(saved.size)
    holds = [f"{part} {count:,} {dtype}" for (part, dtype), count in sorted(counts.items())]
    ranks = sum(name.startswith("random.") and name.endswith(".cpu") for name in tensors)
    holds.append(f"random state of {ranks} rank{'s' if ranks > 1 else ''}")
    return [*known, *holds]


def main() -> None:
    parser = ArgumentParser(prog="python -m tidar.export", description=__doc__.split("\n\n")[1])
    parser.add_argument("--checkpoint", type=Path, help="RUN/checkpoint/step-<n>")
    parser.add_argument("--output", type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument("--list", type=Path, metavar="RUN", help="a run's job.dump_folder; writes nothing")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights [bfloat16]"
    )
    with user_errors_exit():
        arguments = parser.parse_args()
        if arguments.list:
            print_lines(*list_checkpoints(arguments.list))
            return
        for name in ("checkpoint", "output"):
            if getattr(arguments, name) is None:
                raise UserError(f"the following arguments are required: --{name}; or --list RUN alone")
        started = time.perf_counter()
        export(arguments.checkpoint, arguments.output, getattr(torch, arguments.dtype))
        options = read_config_json(arguments.output)
        method, seconds = options.get("tidar", {}), time.perf_counter() - started
        note = without_generate(method.get("pattern", ""))
        print_lines(f"{arguments.output}: {arguments.dtype}, written in {seconds:.1f} s{note}")
        before = method.get("vocab_size_before_mask_token")
        if before:
            print(f"the vocabulary has grown from {before} to {options['vocab_size']} rows, for the mask token")


if __name__ == "__main__":
    main()
