"""Distributed checkpoints: <dump folder>/checkpoint/step-<n>/, in DCP's format, each with its manifest."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidar.config import UserError, print_lines
from tidar.config.options import Checkpoint
from tidar.distributed import World
from tidar.models import Decoder
from tidar.training.checkpoint.restore import find_newest, load
from tidar.training.checkpoint.retention import remove_superseded
from tidar.training.checkpoint.staging import Staging
from tidar.training.checkpoint.state import local, random_state, set_random_state, training_state
from tidar.training.checkpoint.writer import CheckpointWriter, SaveError


class Checkpointer:
    """Saves and restores everything that a run resumes from.

    That is the model, the optimizer, the tensors of `progress` (step, data position, counts, sums of the epoch, skipped
    steps, loss scale) and the random state of every rank. The learning rate is a function of these and needs no state.

    A checkpoint is written under a temporary name, flushed to the disk, and renamed once its manifest is written. A
    folder that has the name and agrees with its manifest is whole; nothing else counts. With checkpoint.async_mode a
    thread does this while training continues; there is one save at a time.
    """

    def __init__(
        self,
        dump_folder: Path,
        options: Checkpoint,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Tensor],
        world: World,
        group: dist.ProcessGroup,
        save_group: dist.ProcessGroup,
        write_assets: Callable[[Path], None],
        log: Callable[..., None],
    ):
        """group, save_group: of all ranks, on the CPU. Their timeout bounds the wait for the slowest reader or writer.
        save_group belongs to the thread that saves.
        write_assets: writes everything of an exported model but its weights to a new folder.
        """
        self.dump_folder = dump_folder
        self.folder = dump_folder / "checkpoint"
        self.options = options
        # taken now, while all parameters are sharded; FSDP2 registers unsharded ones during a forward pass
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.optimizer, self.shard = optimizer, model.shard
        self.progress = progress
        self.world = world
        self.group = group
        self.write_assets = write_assets
        self.log = log
        self.staging = Staging(options.async_mode, world.device)
        self.threads = min(8, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self.writer = CheckpointWriter(self.folder, world.rank, save_group, self.threads)
        self.thread: threading.Thread | None = None
        self.failure: tuple[int, Exception] | None = None
        self.saved_step: int | None = None
        self.damaged: set[int] = set()
        self.stall: float | None = None

    def save(self, step: int, about: dict[str, Any]) -> None:
        """Writes step-<step>, then removes the checkpoints that checkpoint.keep_latest_k and others do not keep.

        about: the manifest's description of the run; checkpoint.save_best reads "val_loss" from it, None if unknown.
        Waits for the save before to end, and returns as soon as training may continue. Raises UserError where that or
        this one has failed, unless checkpoint.on_error is "continue".
        """
        started = time.perf_counter()
        self.finish()
        live = self._state() | random_state(self.world)
        arguments = (step, about, live, *self._stage(live))
        if self.options.async_mode == "disabled":
            self._save(*arguments)
            self.check()
        else:
            self.thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
            self.thread.start()
        self.stall = max(self.stall or 0.0, time.perf_counter() - started)

    def reserve(self) -> None:
        """Allocates the host memory that saves need all the time. Raises UserError where there is too little."""
        self.staging.reserve(local(self._state() | random_state(self.world)))

    def finish_last(self, step: int) -> None:
        """Waits for the save of the run's last step. Raises UserError where that checkpoint is not whole."""
        self.finish()
        if self.saved_step != step:
            raise UserError(*self._failure_lines(step, "see above"))

    def before_update(self) -> None:
        """Called before parameters and moments change: tensors that are being saved are copied by then."""
        self.staging.before_update()

    def finish(self) -> None:
        """Waits for the save in progress, if there is one. Raises UserError where it has failed (see `save`)."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    @property
    def saved_path(self) -> Path | None:
        """The newest checkpoint that is known to be whole, None where there is none."""
        return None if self.saved_step is None else self.folder / f"step-{self.saved_step}"

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed and must stop the run. Ranks may learn of it at different times."""
        return self.failure is not None

    def check(self) -> None:
        """Raises UserError where the last save has failed (see `save`)."""
        if self.failure:
            step, failure = self.failure
            self.failure = None
            raise UserError(*self._failure_lines(step, failure))

    def take_stall(self) -> dict[str, float]:
        """perf/save_stall_seconds: for how long the last save blocked training, once. Synchronizes."""
        if self.stall is None:
            return {}
        seconds, self.stall = self.stall + self.staging.device_wait(), None
        return {"perf/save_stall_seconds": seconds}

    def close(self) -> None:
        """Waits for the save in progress, ignores its outcome, and frees memory."""
        if self.thread:
            self.thread.join()
        self.staging.close()

    def clean_up(self) -> None:
        """Removes incomplete and superseded checkpoints that a killed run left. For rank 0."""
        self.writer.clean_up()
        if self.saved_step is not None:
            remove_superseded(self.dump_folder, self.options, self.saved_step, self.damaged, self.log)

    def newest(self) -> Path | None:
        """Folder of the newest whole checkpoint, None where there is no checkpoint. See `find_newest` for errors."""
        if self.world.rank == 0:
            self.writer.clean_up()
        self.saved_step, self.damaged = find_newest(self.dump_folder, self.world, self.group, self.threads, self.log)
        return self.saved_path

    def load(self, path: Path) -> None:
        """Restores everything from a checkpoint's folder. Raises UserError as `restore.load` does."""
        set_random_state(load(path, self._state(), random_state(self.world), self.group))

    def _save(
        self,
        step: int,
        about: dict[str, Any],
        live: dict[str, Any],
        staged: dict[str, Tensor],
        copied: torch.cuda.Event | None,
    ) -> None:
        """A save after staging. Keeps an error for the main thread, or logs it."""
        try:
            if copied:
                copied.synchronize()
            files = self._write(step, live, staged)
            self._commit(step, files, about)
            self.saved_step = step
            self.damaged.discard(step)
            self._remove_old(step)
        except SaveError as failure:
            self.writer.discard(step)
            if self.options.on_error == "continue":
                first, second = self._failure_lines(step, failure)
                self.log(f"warning: {first}", second)
            else:
                self.failure = (step, failure)
        except Exception as error:  # on this rank only: another rank has died, for example
            self.failure = (step, error)
            first, second = self._failure_lines(step, error)
            print_lines(f"error: rank {self.world.rank}: {first}", second, file=sys.stderr)

    def _failure_lines(self, step: int, failure: Exception | str) -> tuple[str, str]:
        saved = f"the newest whole one is {self.saved_path}" if self.saved_path else "the run has no whole one yet"
        return f"{self.folder / f'step-{step}'}: could not be saved: {failure}", saved

    # the phases of a save, in order

    def _stage(self, live: dict[str, Any]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        return self.staging.take(local(live))

    def _write(self, step: int, live: dict[str, Any], staged: dict[str, Tensor]) -> dict[str, list]:
        return self.writer.write(step, live, staged, self.write_assets)

    def _commit(self, step: int, files: dict[str, list], about: dict[str, Any]) -> None:
        self.writer.commit(step, files, about)

    def _remove_old(self, newest: int) -> None:
        """newest: step of the newest checkpoint, which is whole by now."""
        if self.world.rank == 0:
            remove_superseded(self.dump_folder, self.options, newest, self.damaged, self.log)

    def _state(self) -> dict[str, Any]:
        return training_state(self.parameters, self.optimizer, self.progress, self.shard)
