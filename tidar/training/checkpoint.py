"""Distributed checkpoints: <dump folder>/checkpoint/step-<n>/, in DCP's format."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tidar.config import UserError
from tidar.distributed import World
from tidar.models import ASSETS, CheckpointReader
from tidar.training.optimizer import state_tensors


class Checkpointer:
    """Saves and restores everything that a run goes on from.

    That is the model, the optimizer, the tensors of `progress` (step, data position, sums of the epoch, skipped steps,
    loss scale) and the random state of every rank. The learning rate is a function of these and needs no state.
    """

    def __init__(
        self,
        dump_folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Tensor],
        world: World,
        group: dist.ProcessGroup,
        write_assets: Callable[[Path], None],
    ):
        """group: of all ranks, on the CPU; its timeout is the longest wait for the slowest writer or reader.
        write_assets: makes the folder in a step's folder that holds all of an exported model but its weights.
        """
        self.folder = dump_folder / "checkpoint"
        # the sharded ones: a model whose parameters are gathered at the moment would name others
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.progress = progress
        self.world = world
        self.group = group
        self.write_assets = write_assets

    def save(self, step: int) -> None:
        """Writes step-<step>: beside its final name first, so that what bears the name is whole."""
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(self.group)
        dcp.save(self._state() | self._random_state(), checkpoint_id=partial, process_group=self.group)
        if self.world.rank == 0:
            self.write_assets(partial / ASSETS)
            # a run that was started again from an older step writes its steps anew
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        dist.barrier(self.group)

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint, None where there is none.

        Raises UserError where a rank does not find what rank 0 found.
        """
        steps = [int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        step = torch.tensor(max(steps, default=-1))
        dist.broadcast(step, src=0, group=self.group)
        if step < 0:
            return None
        path = self.folder / f"step-{step}"
        found = torch.tensor(int(path.exists()))
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        if not found:
            raise UserError(f"{path}: is not on all nodes; job.dump_folder must be one that they share")
        return path

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
