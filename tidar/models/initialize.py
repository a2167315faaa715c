"""First values of the parameters."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tidar.config import derive_seed
from tidar.models.decoder import Decoder

# that draw at one time, each a parameter of its own, which is held meanwhile
THREADS = 8


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Gives every parameter its first value: norms 1, biases 0, matrices normal with `initializer_range`.

    A value is a function of (seed, name of the parameter): each parameter is drawn whole, on the CPU, and then sliced,
    so it depends neither on the sharding nor on the device.
    """

    def draw(named: tuple[str, nn.Parameter]) -> torch.Tensor:
        name, parameter = named
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        return whole.normal_(0, model.config.initializer_range, generator=generator)

    matrices = []
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1)
        else:
            matrices.append((name, parameter))
    # a parameter is drawn by one core
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(matrices), threads):
            some = matrices[first : first + threads]
            for (_, parameter), whole in zip(some, pool.map(draw, some)):
                _fill(parameter, whole)


def _fill(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        # every rank has drawn the same whole, so each slices its own and nothing is sent
        whole = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(whole)
