"""Parts of the decoder's parameters: which elements the ranks of tensor parallelism have."""

import pytest
import torch

from tidar.models import Decoder, DecoderConfig, TensorShard, initialize, local_blocks

# two query heads for each of four key/value heads
CONFIG = DecoderConfig(
    vocab_size=24,
    dim=12,
    n_layers=1,
    n_heads=8,
    n_kv_heads=4,
    head_dim=2,
    hidden_dim=20,
    qkv_bias=True,
    o_bias=True,
    qk_norm=True,
    tie_embeddings=False,
)


def own_part(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """By heads, hidden units and tokens."""
    if "qkv_proj" in name:
        groups = whole.unflatten(0, (4, 2 + 1 + 1, 2))  # key/value heads; their heads; head_dim
        return groups[4 // size * rank : 4 // size * (rank + 1)].flatten(0, 2)
    if "gate_up" in name:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if "o_proj.weight" in name or "down_proj" in name:
        return whole.chunk(size, dim=1)[rank]
    return whole.chunk(size)[rank] if "embed" in name or "head" in name else whole


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_have_their_heads_units_and_tokens(size):
    """First values, and the number of each element in the whole parameter, which its rounding depends on."""
    whole = Decoder(CONFIG)
    initialize(whole, seed=3)
    for rank in range(size):
        shard = TensorShard(rank, size)
        model = Decoder(CONFIG, shard=shard)
        initialize(model, seed=3)
        for name, parameter in model.named_parameters():
            all_of_it = whole.get_parameter(name)
            assert parameter.equal(own_part(name, all_of_it, rank, size)), name
            assert shard.whole_shape(name, parameter.shape) == all_of_it.shape
            numbers = own_part(name, torch.arange(all_of_it.numel()).view_as(all_of_it), rank, size)
            at, (start, run, gap) = torch.arange(parameter.numel()), shard.numbering(name, parameter.shape)
            assert numbers.flatten().equal(start + at + at // run * gap)
            _, blocks = local_blocks(shard, name, parameter)
            for block in blocks:
                rows = all_of_it[block.row : block.row + block.length]
                rows = rows[:, block.column : block.column + parameter.shape[1]] if rows.ndim > 1 else rows
                assert rows.equal(parameter[block.at : block.at + block.length])
            assert sum(block.length for block in blocks) == len(parameter)
