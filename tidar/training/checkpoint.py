"""Distributed checkpoints: <dump folder>/checkpoint/step-<n>/, in DCP's format."""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tidar.distributed import World
from tidar.training.optimizer import state_tensors


class Checkpointer:
    """Saves and restores everything that a run goes on from.

    That is the model, the optimizer, the tensors of `progress` (step, data position, sums of the epoch) and the random
    state of every rank. The learning rate is a function of the step and needs no state.
    """

    def __init__(
        self,
        dump_folder: Path,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        progress: dict[str, Tensor],
        world: World,
    ):
        self.folder = dump_folder / "checkpoint"
        self.model = model
        self.optimizer = optimizer
        self.progress = progress
        self.world = world

    def save(self, step: int) -> None:
        """Writes step-<step>: beside its final name first, so that what bears the name is whole."""
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        dcp.save(self._state() | self._random_state(), checkpoint_id=partial)
        if self.world.rank == 0:
            # a run that was started again from an older step writes its steps anew
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        dist.barrier()

    def load_latest(self) -> int:
        """Restores the newest checkpoint and returns its step, or 0 where there is none."""
        steps = [int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        if not steps:
            return 0
        path = self.folder / f"step-{max(steps)}"
        random_state = self._random_state()
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if f"random.world_size_{self.world.size}.rank_0.cpu" not in saved:
            # another number of ranks: nothing that a step computes depends on the random state, so it starts fresh
            random_state = {}
        dcp.load(self._state() | random_state, checkpoint_id=path)
        self._set_random_state(random_state)
        return max(steps)

    def _state(self) -> dict[str, Tensor]:
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = {f"optimizer.{name}": t for name, t in state_tensors(self.model, self.optimizer).items()}
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
