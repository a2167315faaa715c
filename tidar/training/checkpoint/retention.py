"""Which checkpoints are kept: checkpoint.keep_latest_k, keep_every_n_steps and save_best."""

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
    """Removes the checkpoints of a run's folder that the options do not keep. A folder that cannot be removed stays,
    with a warning.

    newest: step of the newest whole one. Those that are damaged, or later, are left for the user to look at: had a
    later one been whole, the run would have resumed from it.
    """
    if not options.keep_latest_k:
        return
    losses: dict[int, float | None] = {}
    paths = saved_steps(run)
    for step, path in paths.items():
        if step <= newest and step not in damaged:
            try:
                losses[step] = read_manifest(path)["about"].get("val_loss")
            except ValueError:
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
    """Renames a folder, then removes it, so that none is half removed under its name. Raises OSError where it cannot be
    renamed.
    """
    doomed = path.with_name(f"{path.name}.removed")
    remove_tree(doomed)
    os.replace(path, doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Removes a folder as far as possible, or a link in place of one, without touching what it points at."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
