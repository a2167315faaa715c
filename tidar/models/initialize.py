"""First values of the parameters."""

import torch

from tidar.config import derive_seed
from tidar.kernels.counter_random import mix, normals
from tidar.models.decoder import Decoder
from tidar.models.huggingface.layout import pieces, row_ranges
from tidar.models.shards import local_blocks


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Gives every parameter its first value: norms 1, biases 0, matrices normal with `initializer_range`.

    A value is a function of (seed, name of the tensor of Hugging Face's base model that holds it, its index there), so
    values depend neither on sharding, nor on the device, nor on what is fused. Each rank draws its part alone, on the
    device that holds it.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        local, blocks = local_blocks(model.shard, name, parameter)
        n_rows, n_columns = model.shard.whole_shape(name, parameter.shape)
        for rows in row_ranges(name, n_rows, model.config):
            key = mix(derive_seed(seed, rows.name.removeprefix("model.")))
            shift = rows.start - rows.at
            for block in blocks:
                columns = torch.arange(block.column, block.column + local.shape[1], device=local.device)
                begin, end = max(rows.at, block.row), min(rows.at + rows.length, block.row + block.length)
                for start, stop in pieces(local.shape, begin, end):
                    counters = torch.arange(start + shift, stop + shift, device=local.device)[:, None] * n_columns
                    values = normals(key, counters + columns).mul_(model.config.initializer_range)
                    first = start - block.row + block.at
                    local[first : first + stop - start] = values
