"""What a run that goes on must have in common with what it was."""

import dataclasses
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tidar import __version__
from tidar.config import Config, UserError
from tidar.models.huggingface import recorded_model
from tidar.patterns import EXPERIMENTS
from tidar.training.checkpoint.manifest import read_manifest

# options without which the same steps mean something else; the data is compared by what it holds (see Progress)
COMPARED = (
    "tidar.pattern",
    "tidar.block_size",
    "tidar.clean_ratio",
    *(f"tidar.{name}" for name in EXPERIMENTS),
    "tidar.ar_loss_weight",
    "tidar.diffusion_loss_weight",
    "training.seed",
    "training.seq_len",
    "training.global_batch_size",
)


def compared_options(config: Config, global_batch_size: int) -> dict[str, Any]:
    """Those of COMPARED, by name; global_batch_size: as it was resolved."""
    values = {}
    for name in COMPARED:
        section, option = name.split(".")
        values[name] = getattr(getattr(config, section), option)
    return values | {"training.global_batch_size": global_batch_size}


def about_checkpoint(
    config: Config, global_batch_size: int, counts: dict[str, float], devices: int, val_loss: float | None
) -> dict:
    """What the manifest of a checkpoint says of the run that saves it. counts: see `Progress.counts`."""
    return {
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **counts,
        "devices": devices,
        "val_loss": val_loss,
        "compared": compared_options(config, global_batch_size),
        "options": dataclasses.asdict(config),
        "torch": torch.__version__,
        "tidar": __version__,
    }


def check_options(checkpoint: Path, now: dict[str, Any]) -> list[str]:
    """How the options differ from those of a whole checkpoint: "name: before -> now"."""
    before = read_manifest(checkpoint)["about"].get("compared", {})
    return [f"{name}: {before[name]} -> {now[name]}" for name in before if name in now and before[name] != now[name]]


def check_model(folder: Path, checkpoint: Path, vocab_size: int, mask_token_id: int) -> None:
    """Raises UserError where the checkpoint is of a model with other tokens. folder: of the run."""
    before, now = recorded_model(checkpoint), (vocab_size, mask_token_id)
    if before != now:
        raise UserError(
            f"{folder} was trained with a vocabulary of {before[0]} and mask token {before[1]}, and now they "
            f"are {now[0]} and {now[1]}: go on with the same model and tokens, or choose another job.dump_folder"
        )
