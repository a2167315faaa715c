"""Context parallelism: each rank has some positions of every row, and gathers the keys and values that others see."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidar.distributed.world import World
from tidar.models import Mask
from tidar.patterns import RowSharding

# these, and not torch.distributed's functions, can be traced by torch.compile
collectives = torch.ops._c10d_functional


class GatheredAttention(NamedTuple):
    """In place of a mask: queries attend to the shared keys and values of all ranks, and to this rank's private ones.

    mask: over these. shared: length of each shared part of whole rows, which the local positions begin with, dealt as
    `RowSharding` says. group: name of the ranks' process group.
    """

    mask: Mask
    shared: tuple[int, ...]
    n_ranks: int
    group: str

    def attended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeySource`. One all-gather, of the shared keys and values alone; backward one reduce-scatter."""
        n_local = sum(self.shared) // self.n_ranks
        if n_local == 0:
            return k, v
        local = torch.stack([k[:, :, :n_local], v[:, :, :n_local]])
        gathered = _AllGather.apply(local, self.n_ranks, self.group).unflatten(0, (self.n_ranks, 2))
        parts, first = [], 0
        for length in self.shared:
            chunk = length // (2 * self.n_ranks)
            # ranks, k and v, batch, heads, chunk, head_dim
            heads, tails = gathered.narrow(4, first, 2 * chunk).split(chunk, dim=4)
            parts += [*heads.unbind(), *reversed(tails.unbind())]
            first += 2 * chunk
        keys, values = torch.cat(parts, dim=3)
        own_k, own_v = k[:, :, n_local:], v[:, :, n_local:]
        return torch.cat([keys, own_k], dim=2), torch.cat([values, own_v], dim=2)


def gathered_attention(sharding: RowSharding | None, world: World) -> Callable[[Mask], GatheredAttention] | None:
    """What the layers get in place of a rank's mask, made of the mask; None where ranks share no rows."""
    if sharding is None:
        return None
    return partial(GatheredAttention, shared=sharding.shared, n_ranks=world.cp_size, group=world.cp_group.group_name)


class _AllGather(torch.autograd.Function):
    """The tensors of all ranks one after the other in the first dimension; backward sums and scatters the gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, n_ranks: int, group: str) -> Tensor:
        ctx.ranks = n_ranks, group
        return collectives.wait_tensor(collectives.all_gather_into_tensor(local, n_ranks, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        scattered = collectives.reduce_scatter_tensor(gradient.contiguous(), "sum", *ctx.ranks)
        return collectives.wait_tensor(scattered), None, None
