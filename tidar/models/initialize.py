"""First values of the parameters."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from tidar.config import derive_seed
from tidar.models.decoder import Decoder
from tidar.models.huggingface.layout import local_rows, published_ranges, published_shapes

# each draws a tensor of its own, which is held meanwhile
THREADS = 8


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Gives every parameter its first value: norms 1, biases 0, matrices normal with `initializer_range`.

    A value is a function of (seed, name of the tensor of Hugging Face's base model that holds it): each tensor is drawn
    whole, on the CPU, and then sliced, so values depend neither on sharding, nor on the device, nor on what is fused.
    """

    def draw(tensor: tuple[str, tuple[int, ...]]) -> torch.Tensor:
        name, shape = tensor
        generator = torch.Generator().manual_seed(derive_seed(seed, name.removeprefix("model.")))
        return torch.empty(shape, dtype=torch.float32).normal_(0, model.config.initializer_range, generator=generator)

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
    matrices = {name: tuple(parameter.shape) for name, parameter in parameters.items() if parameter.ndim > 1}
    ranges = published_ranges(matrices, model.config)
    tensors = list(published_shapes(matrices, model.config).items())
    # a tensor is drawn by one core
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for number in range(0, len(tensors), threads):
            some = tensors[number : number + threads]
            for (name, _), whole in zip(some, pool.map(draw, some)):
                for fused, rows in ranges[name]:
                    local, first = local_rows(parameters[fused])
                    start, stop = max(rows.at, first), min(rows.at + rows.length, first + len(local))
                    if start < stop:
                        shift = rows.start - rows.at
                        local[start - first : stop - first] = whole[start + shift : stop + shift]
