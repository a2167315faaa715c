"""Options and model that a resumed run is compared by with the run that saved the checkpoint."""

import dataclasses
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tidar import __version__
from tidar.config import Config, UserError, set_option
from tidar.models import DecoderConfig
from tidar.models.huggingface import model_differences, recorded_model
from tidar.patterns import EXPERIMENTS
from tidar.training.optim.schedule import learning_rate

# options that change what a step computes; the data is compared by its content (see Progress)
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
    """The options of COMPARED by name. global_batch_size: the resolved one."""
    values = {}
    for name in COMPARED:
        section, option = name.split(".")
        values[name] = getattr(getattr(config, section), option)
    return values | {"training.global_batch_size": global_batch_size}


def about_checkpoint(
    config: Config, global_batch_size: int, counts: dict[str, float], devices: int, val_loss: float | None, steps: int
) -> dict:
    """The manifest's description of the run that saves it. counts: see `Progress.counts`. steps: of the whole run."""
    return {
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **counts,
        "devices": devices,
        "val_loss": val_loss,
        "steps": steps,
        "compared": compared_options(config, global_batch_size),
        "options": dataclasses.asdict(config),
        "torch": torch.__version__,
        "tidar": __version__,
    }


def changed_options(about: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that differ from a checkpoint's, each as "name: before -> now". about: see `about_checkpoint`."""
    before = about.get("compared", {})
    return [f"{name}: {before[name]} -> {now[name]}" for name in before if name in now and before[name] != now[name]]


def changed_data_options(about: dict[str, Any], config: Config) -> list[str]:
    """The options of the documents to train on that differ from a checkpoint's, each as "name: before -> now"."""
    before, found = about.get("options", {}), []
    for section, names in (("data", [*vars(config.data)]), ("validation", ["enable", "share", "paths"])):
        for name in names:
            now = getattr(getattr(config, section), name)
            if (old := before.get(section, {}).get(name, now)) != now:
                found.append(f"{section}.{name}: {old} -> {now}")
    return found


def check_model(folder: Path, checkpoint: Path, decoder: DecoderConfig, mask_token_id: int) -> None:
    """Raises UserError where the checkpoint is of another model, or of one with other tokens. folder: of the run.

    Only this function compares a run's model with that of the checkpoint it resumes from.
    """
    before, mask_before = recorded_model(checkpoint)
    found = model_differences(before, decoder)
    if mask_before != mask_token_id:
        found.append(f"mask_token_id: {mask_before} -> {mask_token_id}")
    if found:
        raise UserError(
            f"{folder} was trained with another model: {'; '.join(found)}",
            "resume with the same model and tokens, or choose another job.dump_folder",
        )


def rate_jump(about: dict[str, Any], config: Config, steps: int, step: int, skipped: int) -> list[str]:
    """A warning where the next step has another learning rate than it would have had in the run that was saved.

    steps: of the whole run. step, skipped: steps done, and how many of them were skipped.
    """
    before = Config()
    schedule = [f"lr_scheduler.{field.name}" for field in dataclasses.fields(config.lr_scheduler)]
    changes = []
    try:
        for name in ("optimizer.lr", *schedule):
            section, option = name.split(".")
            set_option(before, name, about["options"][section][option], origin="")
            old, new = (getattr(getattr(options, section), option) for options in (before, config))
            changes += [f"{name}: {old} -> {new}"] if old != new else []
        steps_before = about["steps"]
    except (KeyError, TypeError, UserError):  # an older checkpoint
        return []
    changes += [f"steps: {steps_before} -> {steps}"] if steps_before != steps else []
    done = step - skipped
    last, planned = (
        learning_rate(update, steps_before, before.optimizer.lr, before.lr_scheduler) for update in (done, done + 1)
    )
    now = learning_rate(done + 1, steps, config.optimizer.lr, config.lr_scheduler)
    if done < 1 or step >= steps or math.isclose(planned, now, rel_tol=0.01, abs_tol=1e-6 * config.optimizer.lr):
        return []
    return [f"warning: the learning rate jumps from {last:.2e} to {now:.2e} at step {step + 1} ({'; '.join(changes)})"]
