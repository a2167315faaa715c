"""Removes old checkpoints, by checkpoint.keep_latest_k, keep_every_n_steps and save_best."""

import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tidar.config.options import Checkpoint
from tidar.models.huggingface.manifest import read_manifest, saved_steps


def remove_superseded(
    run: Path, options: Checkpoint, newest: int, damaged: Collection[int], log: Callable[[str], None]
) -> None:
    """Removes the checkpoints in a run's folder that no option keeps. keep_latest_k = 0 keeps all. A folder that
    cannot be removed stays, and `log` gets a warning.

    newest: step of the newest valid checkpoint. damaged: steps that failed verification. Damaged checkpoints are not
    removed, so that the user can inspect them. The same holds for those later than `newest`: they are damaged too, or
    the run would have resumed from them.
    """
    if not options.keep_latest_k:
        return
    losses: dict[int, float | None] = {}
    paths = saved_steps(run)
    for step, path in paths.items():
        if step <= newest and step not in damaged:
            try:
                losses[step] = read_manifest(path)["about"].get("val_loss")
            except ValueError:  # damaged: stays
                continue
    kept = set(sorted(losses)[-options.keep_latest_k :])
    if options.keep_every_n_steps:
        kept |= {step for step in losses if step % options.keep_every_n_steps == 0}
    known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if options.save_best and known:
        kept.add(min(known, key=known.__getitem__))
    for step in losses.keys() - kept:
        try:
            remove_folder(paths[step])
        except OSError as error:
            log(f"warning: {paths[step]}: cannot be removed ({error.strerror})")


def remove_folder(path: Path) -> None:
    """Renames a folder to <name>.removed before removing it: an interruption leaves no incomplete checkpoint under the
    old name. Raises OSError if it cannot be renamed.
    """
    renamed = path.with_name(f"{path.name}.removed")
    remove_tree(renamed)
    os.replace(path, renamed)
    remove_tree(renamed)


def remove_tree(path: Path) -> None:
    """Removes a folder, ignoring errors. If `path` is a symbolic link, only the link is removed."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
