"""Scalars of a run: the console, TensorBoard and metrics.jsonl."""

import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from tidar.config import UserError
from tidar.config.files import open_regular, parse_json, write_atomically
from tidar.distributed import buffer_bytes
from tidar.patterns import LOSSES
from tidar.training.reporting.events import EventFile
from tidar.training.reporting.weights_and_biases import WandbRun


class MetricWriter:
    """Writes scalars by step to <folder>/metrics.jsonl and <folder>/tb, once it is opened.

    metrics.jsonl holds one JSON object a line: "step" and the scalars by name, null where one is not finite.
    """

    def __init__(self, folder: Path, enabled: bool, log: Callable[[str], None], wandb: WandbRun | None = None):
        """enabled: false where another process writes. wandb: gets all of it too."""
        self.folder = folder
        self.enabled = enabled
        self.log = log
        self.wandb = wandb if enabled else None
        self.file: IO | None = None
        self.tensorboard: EventFile | None = None

    @contextmanager
    def opened(self, first_step: int, validates_again: bool) -> Iterator[None]:
        """first_step: scalars that an interrupted run wrote of this step and later ones are dropped: they are repeated.
        validates_again: so is the validation of the step before.

        Raises UserError where nothing can be written.
        """
        path = self.folder / "metrics.jsonl"
        try:
            if self.enabled:
                self.file = _truncated(path, first_step, validates_again)
                self.tensorboard = EventFile(self.folder / "tb", first_step)
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot be written ({error.strerror})") from None
        if self.wandb:
            self.wandb.open()
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.wandb:
                self.wandb.close(failed)
            for file in (self.file, self.tensorboard):
                if file:
                    with self._tolerant():
                        file.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self.file and self.tensorboard:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            with self._tolerant():
                self.file.write(json.dumps({"step": step} | finite) + "\n")
                self.file.flush()
            with self._tolerant():
                self.tensorboard.write(step, scalars)
            if self.wandb:
                self.wandb.write(step, dict(scalars))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Markdown, for TensorBoard and Weights & Biases."""
        if self.tensorboard:
            with self._tolerant():
                self.tensorboard.write_text(step, name, text)
            if self.wandb:
                self.wandb.write(step, {name: text})

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Logs that metrics cannot be written, on a full disk for example: that is no reason to end a run."""
        try:
            yield
        except OSError as error:
            self.log(f"warning: metrics cannot be written ({error.strerror})")


def validation_figures(run: Path, step: int) -> dict[str, float]:
    """The scalars of a step's validation in a run's metrics.jsonl; none where it has none or cannot be read."""
    figures: dict[str, float] = {}
    try:
        with open_regular(run / "metrics.jsonl") as file:
            for line in file:
                scalars = parse_json(line)
                if scalars["step"] == step:
                    figures |= {name: value for name, value in scalars.items() if name.startswith("val/")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _truncated(path: Path, first_step: int, validates_again: bool):
    """Removes the lines of what is repeated, and torn ones. Returns the file, open for appending."""
    kept, lines = [], []
    if os.path.lexists(path):
        with open_regular(path) as file:
            lines = file.readlines()
    for line in lines:
        try:
            scalars = parse_json(line)
            before = line.endswith(b"\n") and scalars["step"] < first_step
            before = before and not (validates_again and scalars["step"] == first_step - 1 and "val/loss" in scalars)
        except (ValueError, TypeError, KeyError):
            before = False
        if before:
            kept.append(line)
    write_atomically(path, b"".join(kept))
    return open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW))


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + buffer_bytes()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step_line(step: int, steps: int, scalars: dict[str, float], seconds_left: float) -> str:
    """One console line for a training step."""
    mfu = f"mfu {scalars['perf/mfu']:.1%}  " if "perf/mfu" in scalars else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  {_losses(scalars, 'train/batch_')}  "
        f"lr {scalars['train/lr']:.2e}  grad {scalars['train/grad_norm']:.2f}  "
        f"{scalars['perf/tokens_per_second']:,.0f} tok/s  {scalars['memory/peak_gib']:.2f} GiB  "
        f"{mfu}left {format_duration(seconds_left)}"
    )


def validation_lines(scalars: dict[str, float]) -> list[str]:
    """Console lines for a validation: the means, then the drafts by position in the block."""
    names = {"accuracy": "val/accuracy", "drafts": "val/accuracy_diff"}
    accuracies = [f"{title} {scalars[name]:.3f}" for title, name in names.items() if name in scalars]
    lines = [f"validation  {_losses(scalars, 'val/')}  {', '.join(accuracies)}"]
    if "val/accepted_prefix" in scalars:
        lines[0] += f"  accepted prefix {scalars['val/accepted_prefix']:.3f}"
    for title, name in (("diffusion loss", "val/diffusion_loss_at/"), ("draft accuracy", "val/accuracy_diff_at/")):
        values = [f"{value:.3f}" for key, value in scalars.items() if key.startswith(name)]
        if values:
            lines.append(f"  {title} by position in the block: {' '.join(values)}")
    return lines


def _losses(scalars: dict[str, float], prefix: str) -> str:
    if f"{prefix}loss" not in scalars:
        return "no targets"
    parts = {loss: f"{prefix}{loss}_loss" for loss in LOSSES}
    texts = [f"{loss} {scalars[name]:.4f}" for loss, name in parts.items() if name in scalars]
    return f"loss {scalars[prefix + 'loss']:.4f} ({', '.join(texts)})"


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
