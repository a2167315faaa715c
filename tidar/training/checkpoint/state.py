"""The tensors of a checkpoint by name: model.*, optimizer.*, progress.* and random.*."""

import torch
from torch import Tensor, nn

from tidar.distributed import World
from tidar.training.optim.optimizer import state_tensors


def training_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that a run saves, and that a checkpoint is loaded into; sharded as they are."""
    model = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    moments = {f"optimizer.{name}": tensor for name, tensor in state_tensors(parameters, optimizer).items()}
    return model | moments | {f"progress.{name}": tensor for name, tensor in progress.items()}


def random_state(world: World) -> dict[str, Tensor]:
    """The state of this rank's random generators. The names say for how many ranks it is meaningful."""
    name = f"random.world_size_{world.size}.rank_{world.rank}"
    state = {f"{name}.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"{name}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Sets the generators that `random_state` has read."""
    for name, tensor in state.items():
        (torch.cuda.set_rng_state if name.endswith(".cuda") else torch.set_rng_state)(tensor)
