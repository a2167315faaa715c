"""First values of the parameters."""

import math

import torch

from tidar.config import derive_seed
from tidar.kernels.counter_random import mix, normals
from tidar.models.decoder import Decoder
from tidar.models.huggingface.layout import local_rows, pieces, row_ranges


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Gives every parameter its first value: norms 1, biases 0, matrices normal with `initializer_range`.

    A value is a function of (seed, name of the tensor of Hugging Face's base model that holds it, its index there), so
    values depend neither on sharding, nor on the device, nor on what is fused. Each rank draws its rows alone, on the
    device that holds them.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        local, first = local_rows(parameter)
        n_columns = math.prod(parameter.shape[1:])
        for rows in row_ranges(name, len(parameter), model.config):
            key = mix(derive_seed(seed, rows.name.removeprefix("model.")))
            shift = rows.start - rows.at
            begin, end = max(rows.at, first), min(rows.at + rows.length, first + len(local))
            for start, stop in pieces(parameter.shape, begin, end):
                counters = torch.arange((start + shift) * n_columns, (stop + shift) * n_columns, device=local.device)
                values = normals(key, counters).mul_(model.config.initializer_range)
                local[start - first : stop - first] = values.view(stop - start, *parameter.shape[1:])
