"""Distributed checkpoints: <dump folder>/checkpoint/step-<n>/, in DCP's format, each with its manifest."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tidar.config import UserError, print_lines
from tidar.config.options import Checkpoint
from tidar.distributed import World
from tidar.models.huggingface import CheckpointReader
from tidar.training.checkpoint.manifest import check_files, read_manifest, saved_steps
from tidar.training.checkpoint.staging import Staging
from tidar.training.checkpoint.writer import CheckpointWriter, SaveError, error_text, remove_folder
from tidar.training.optim.gradients import local_part
from tidar.training.optim.optimizer import state_tensors


class Checkpointer:
    """Saves and restores everything that a run goes on from.

    That is the model, the optimizer, the tensors of `progress` (step, data position, counts, sums of the epoch, skipped
    steps, loss scale) and the random state of every rank. The learning rate is a function of these and needs no state.

    A checkpoint is written beside its final name, flushed to the disk, and renamed once its manifest is written. What
    bears the name and agrees with its manifest is whole; nothing else counts. With checkpoint.async_mode a thread does
    this while training goes on; there is one save at a time.
    """

    def __init__(
        self,
        dump_folder: Path,
        options: Checkpoint,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Tensor],
        world: World,
        group: dist.ProcessGroup,
        save_group: dist.ProcessGroup,
        write_assets: Callable[[Path], None],
        log: Callable[[str], None],
    ):
        """group, save_group: of all ranks, on the CPU; their timeouts are the longest wait for the slowest writer or
        reader. In save_group ranks meet while they save, on a thread of its own.
        write_assets: makes the folder in a step's folder that holds all of an exported model but its weights.
        """
        self.dump_folder = dump_folder
        self.folder = dump_folder / "checkpoint"
        self.options = options
        # the sharded ones: a model whose parameters are gathered at the moment would name others
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
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
        """Writes step-<step>, then removes what checkpoint.keep_latest_k and others do not keep.

        about: what its manifest is to say of it; checkpoint.save_best goes by "val_loss", None if it is not known.
        Returns once training may go on, after the last save has ended. Raises UserError where that or this one has
        failed, unless checkpoint.on_error says "continue".
        """
        started = time.perf_counter()
        self.finish()
        live = self._state() | self._random_state()
        arguments = (step, about, live, *self._stage(live))
        if self.options.async_mode == "disabled":
            self._save(*arguments)
            self.check()
        else:
            self.thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
            self.thread.start()
        self.stall = max(self.stall or 0.0, time.perf_counter() - started)

    def reserve(self) -> None:
        """Takes the memory that saving needs all along. Raises UserError where there is too little of it."""
        self.staging.reserve(_local(self._state() | self._random_state()))

    def finish_last(self, step: int) -> None:
        """Waits for the save of the step that training ends with. Raises UserError where that is not whole."""
        self.finish()
        if self.saved_step != step:
            raise UserError(*self._failure_lines(step, "see above"))

    def before_update(self) -> None:
        """Before parameters and moments change: what is being saved must be copied by then."""
        self.staging.before_update()

    def finish(self) -> None:
        """Waits for the save under way, if there is one. Raises UserError where it has failed (see `save`)."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    @property
    def saved_path(self) -> Path | None:
        """The newest whole checkpoint that is known, None where there is none."""
        return None if self.saved_step is None else self.folder / f"step-{self.saved_step}"

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed, and the run is to stop for it. Ranks may learn of it at different times."""
        return self.failure is not None

    def check(self) -> None:
        """Raises UserError where the last save has failed (see `save`)."""
        if self.failure:
            step, failure = self.failure
            self.failure = None
            raise UserError(*self._failure_lines(step, failure))

    def take_stall(self) -> dict[str, float]:
        """perf/save_stall_seconds: for how long the last save held training, once. Waits for the device."""
        if self.stall is None:
            return {}
        seconds, self.stall = self.stall + self.staging.device_wait(), None
        return {"perf/save_stall_seconds": seconds}

    def close(self) -> None:
        """Waits for the save under way whatever comes of it, and gives memory back."""
        if self.thread:
            self.thread.join()
        self.staging.close()

    def _save(
        self,
        step: int,
        about: dict[str, Any],
        live: dict[str, Tensor],
        staged: dict[str, Tensor],
        copied: torch.cuda.Event | None,
    ) -> None:
        """All of a save but staging. Keeps an error for the main thread, or tells of it."""
        try:
            if copied:
                copied.synchronize()
            files = self._write(step, live, staged)
            self._commit(step, files, about)
            self.saved_step = step
            self.damaged.discard(step)
            self._remove_old(step)
        except SaveError as failure:
            self.writer.give_up(step)
            if self.options.on_error == "continue":
                first, second = self._failure_lines(step, failure)
                self.log(f"warning: {first}", second)
            else:
                self.failure = (step, failure)
        except Exception as error:  # this rank's alone: another one has died, say
            self.failure = (step, error)
            first, second = self._failure_lines(step, error)
            print_lines(f"error: rank {self.world.rank}: {first}", second, file=sys.stderr)

    def _failure_lines(self, step: int, failure: Exception | str) -> tuple[str, str]:
        saved = f"the last whole one is {self.saved_path}" if self.saved_path else "the run has no whole one yet"
        return f"{self.folder / f'step-{step}'}: could not be saved: {failure}", saved

    # the phases of a save, in their order

    def _stage(self, live: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        return self.staging.take(_local(live))

    def _write(self, step: int, live: dict[str, Tensor], staged: dict[str, Tensor]) -> dict[str, list]:
        return self.writer.write(step, live, staged, self.write_assets)

    def _commit(self, step: int, files: dict[str, list], about: dict[str, Any]) -> None:
        self.writer.commit(step, files, about)

    def _remove_old(self, step: int) -> None:
        """The newest, of step number `step`, is whole by now."""
        if self.world.rank == 0:
            self._remove_unkept(step)

    def _remove_unkept(self, newest: int) -> None:
        options, losses = self.options, {}
        if not options.keep_latest_k:
            return
        for step, path in saved_steps(self.dump_folder).items():
            try:
                losses[step] = read_manifest(path)["about"].get("val_loss")
            except ValueError:
                continue  # damaged ones are left for the user to look at
        # so are those that a start found damaged, or that are later: had these been whole, it had gone on from them
        losses = {step: loss for step, loss in losses.items() if step <= newest and step not in self.damaged}
        kept = set(sorted(losses)[-options.keep_latest_k :])
        if options.keep_every_n_steps:
            kept |= {step for step in losses if step % options.keep_every_n_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        if options.save_best and known:
            kept.add(min(known, key=known.get))
        for step in losses.keys() - kept:
            try:
                remove_folder(self.folder / f"step-{step}")
            except OSError as error:
                self.log(f"warning: {self.folder / f'step-{step}'}: cannot be removed ({error.strerror})")

    def clean_up(self) -> None:
        """Removes what a killed run has left half written, half removed or not yet removed. For rank 0."""
        self.writer.clean_up()
        if self.saved_step is not None:
            self._remove_unkept(self.saved_step)

    def newest(self) -> Path | None:
        """Folder of the newest whole checkpoint, None where there is none; warns of newer ones that are not whole.

        Raises UserError where a rank does not find what rank 0 found.
        """
        if self.world.rank == 0:
            self.writer.clean_up()
        steps = [list(saved_steps(self.dump_folder))]
        dist.broadcast_object_list(steps, src=0, group=self.group)
        for step in reversed(steps[0]):
            path = self.folder / f"step-{step}"
            found = torch.tensor(int(path.exists()))
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
            if not found:
                raise UserError(f"{path}: is not on all nodes; job.dump_folder must be one that they share")
            problem = self._problem(path)
            if not problem:
                self.saved_step = step
                return path
            self.damaged.add(step)
            self.log(f"warning: {path} is not whole, and left out: {problem}")
        return None

    def load(self, path: Path) -> None:
        """Restores everything from a checkpoint's folder.

        Raises UserError where the moments are of another dtype, or what it holds cannot be read.
        """
        reader = CheckpointReader(path)
        saved = reader.read_metadata().state_dict_metadata
        # on other devices nothing of it is there: what a step computes does not depend on it, so it starts fresh
        random_state = {name: tensor for name, tensor in self._random_state().items() if name in saved}
        state = self._state()
        for name, tensor in state.items():
            if name in saved and saved[name].properties.dtype != tensor.dtype:
                before, now = (
                    str(dtype).removeprefix("torch.") for dtype in (saved[name].properties.dtype, tensor.dtype)
                )
                raise UserError(f"optimizer.state_dtype = {now}: {path} has {before}; go on with that")
        # what older checkpoints do not count starts from zero
        state = {name: tensor for name, tensor in state.items() if name in saved or not name.startswith("progress.")}
        try:
            dcp.load(state | random_state, storage_reader=reader, process_group=self.group)
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise UserError(f"{path}: cannot be restored: {error_text(cause)} (rank {rank})") from None
        self._set_random_state(random_state)

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint is not whole, the same on all ranks, which share the work of reading it. None if it is."""
        try:
            files = list(read_manifest(path)["files"].items())
            problem = check_files(path, dict(files[self.world.rank :: self.world.size]), self.threads)
        except ValueError as error:
            problem = str(error)
        problems: list = [None] * self.world.size
        dist.all_gather_object(problems, problem, group=self.group)
        return next((problem for problem in problems if problem), None)

    def _state(self) -> dict[str, Tensor]:
        """By name, the tensors that are saved or loaded into."""
        model = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        optimizer = {f"optimizer.{name}": t for name, t in state_tensors(self.parameters, self.optimizer).items()}
        return model | optimizer | {f"progress.{name}": tensor for name, tensor in self.progress.items()}

    def _random_state(self) -> dict[str, Tensor]:
        name = f"random.world_size_{self.world.size}.rank_{self.world.rank}"
        state = {f"{name}.cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            state[f"{name}.cuda"] = torch.cuda.get_rng_state()
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            (torch.cuda.set_rng_state if name.endswith(".cuda") else torch.set_rng_state)(tensor)


def _local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of them."""
    return {name: local_part(tensor) for name, tensor in tensors.items()}
