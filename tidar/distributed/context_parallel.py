"""Context parallelism: each rank has some positions of every row, and gathers the keys and values that others see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidar.distributed.world import World
from tidar.models import Mask
from tidar.patterns import Share

# these, and not torch.distributed's functions, can be traced by torch.compile
collectives = torch.ops._c10d_functional


class GatheredAttention(NamedTuple):
    """In place of a mask: queries attend to the shared keys and values of all ranks, and to this rank's private ones.

    mask: over these. order, dealt: see `Share`. group: name of the ranks' process group.
    """

    mask: Mask
    order: Tensor
    dealt: Tensor
    n_ranks: int
    group: str

    def attended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeySource`. One all-gather, of the shared keys and values alone; backward one reduce-scatter."""
        n_local = len(self.dealt) // self.n_ranks
        if n_local == 0:
            return k, v
        # keys, batch, then both, heads and head_dim
        local = torch.stack([k[:, :, :n_local], v[:, :, :n_local]]).permute(3, 1, 0, 2, 4)
        shared = _Gathered.apply(local.flatten(2), self.order, self.dealt, self.n_ranks, self.group)
        keys, values = shared.unflatten(2, local.shape[2:]).permute(2, 0, 3, 1, 4)
        return torch.cat([keys, k[:, :, n_local:]], dim=2), torch.cat([values, v[:, :, n_local:]], dim=2)


def gathered_attention(world: World) -> Callable[[Mask, Share], GatheredAttention] | None:
    """What the layers get in place of a rank's mask, made of the mask; None where ranks share no rows."""
    if world.cp_size == 1:
        return None
    size, group = world.cp_size, world.cp_group.group_name
    return lambda mask, share: GatheredAttention(mask, share.order, share.dealt, size, group)


class _Gathered(torch.autograd.Function):
    """All keys in the row's order, `[batch, keys, …]`, from this rank's, `[keys / ranks, batch, …]`; backward sums and
    scatters the gradients.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, order: Tensor, dealt: Tensor, n_ranks: int, group: str) -> Tensor:
        ctx.save_for_backward(dealt)
        ctx.ranks = n_ranks, group
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(local.contiguous(), n_ranks, group))
        return gathered.flatten(0, 1)[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dealt,) = ctx.saved_tensors
        # a permutation is inverted by indexing, where autograd would accumulate
        gradient = gradients[0].flatten(0, 1)[dealt]
        scattered = collectives.reduce_scatter_tensor(gradient, "sum", *ctx.ranks)
        return collectives.wait_tensor(scattered), None, None, None, None
