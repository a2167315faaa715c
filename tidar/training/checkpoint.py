"""Distributed checkpoints: <dump folder>/checkpoint/step-<n>/, in DCP's format, each with its manifest."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tidar.config import UserError
from tidar.config.options import Checkpoint
from tidar.distributed import World
from tidar.models import ASSETS, CheckpointReader
from tidar.training.manifest import (
    check_files,
    describe,
    file_names,
    flush_folder,
    read_manifest,
    saved_steps,
    write_manifest,
)
from tidar.training.optimizer import state_tensors


class Checkpointer:
    """Saves and restores everything that a run goes on from.

    That is the model, the optimizer, the tensors of `progress` (step, data position, sums of the epoch, skipped steps,
    loss scale) and the random state of every rank. The learning rate is a function of these and needs no state.

    A checkpoint is written beside its final name, flushed to the disk, and renamed once its manifest is written. What
    bears the name and agrees with its manifest is whole; nothing else counts.
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
        write_assets: Callable[[Path], None],
        log: Callable[[str], None],
    ):
        """group: of all ranks, on the CPU; its timeout is the longest wait for the slowest writer or reader.
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

    def save(self, step: int, about: dict[str, Any]) -> None:
        """Writes step-<step>, then removes what checkpoint.keep_latest_k and others do not keep.

        about: what its manifest is to say of it; checkpoint.save_best goes by "val_loss", None if it is not known.
        """
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        dcp.save(self._state() | self._random_state(), checkpoint_id=partial, process_group=self.group)
        if self.world.rank == 0:
            self.write_assets(partial / ASSETS)
        # each rank vouches for the files that DCP has let it write, rank 0 for the others too
        rank = self.world.rank
        names = [
            name
            for name in file_names(partial)
            if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))
        ]
        parts: list = [None] * self.world.size
        dist.all_gather_object(parts, describe(partial, names), group=self.group)
        if self.world.rank == 0:
            files = {name: found for part in parts for name, found in part.items()}
            write_manifest(partial, files, {"step": step} | about)
            # a run that was started again from an older step writes its steps anew
            self._remove(final)
            os.replace(partial, final)
            flush_folder(self.folder)
            self._remove_old()
        dist.barrier(self.group)

    def clean_up(self) -> None:
        """Removes what a killed run has left half written or half removed. The folder must be this run's alone."""
        for pattern in ("step-*.partial", "step-*.removed"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Path | None:
        """Folder of the newest whole checkpoint, None where there is none; warns of newer ones that are not whole.

        Raises UserError where a rank does not find what rank 0 found.
        """
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
                return path
            self.log(f"warning: {path} is not whole, and left out: {problem}")
        return None

    def load(self, path: Path) -> None:
        """Restores everything from a checkpoint's folder. Raises UserError where the moments are of another dtype."""
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
        dcp.load(state | random_state, storage_reader=reader, process_group=self.group)
        self._set_random_state(random_state)

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint is not whole, the same on all ranks, which share the work of reading it. None if it is."""
        try:
            files = list(read_manifest(path)["files"].items())
            problem = check_files(path, dict(files[self.world.rank :: self.world.size]))
        except ValueError as error:
            problem = str(error)
        problems: list = [None] * self.world.size
        dist.all_gather_object(problems, problem, group=self.group)
        return next((problem for problem in problems if problem), None)

    def _remove_old(self) -> None:
        """The newest is whole by now."""
        options, losses = self.options, {}
        if not options.keep_latest_k:
            return
        for step, path in saved_steps(self.dump_folder).items():
            try:
                losses[step] = read_manifest(path)["about"].get("val_loss")
            except ValueError:
                continue  # damaged ones are left for the user to look at
        kept = set(sorted(losses)[-options.keep_latest_k :])
        if options.keep_every_n_steps:
            kept |= {step for step in losses if step % options.keep_every_n_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        if options.save_best and known:
            kept.add(min(known, key=known.get))
        for step in losses.keys() - kept:
            self._remove(self.folder / f"step-{step}")

    def _remove(self, path: Path) -> None:
        """Takes the name away first, so that what bears it is never half removed."""
        if path.exists():
            doomed = path.with_name(f"{path.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed)

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
