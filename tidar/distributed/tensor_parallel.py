"""Tensor and sequence parallelism: what the ranks that share each layer exchange.

Outside of attention and MLP, activations are divided by positions (sequence parallelism); inside, by heads or hidden
units. Each of the two begins with an all-gather of positions and ends with a reduce-scatter, which is an all-to-all in
the compute dtype and a local sum in float32: it moves the bytes of NCCL's reduce-scatter, and rounds each sum once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidar.distributed.world import World
from tidar.models import TensorShard

# these, and not torch.distributed's functions, can be traced by torch.compile
collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class TensorParallel(TensorShard):
    """A shard of several, whose process group has the name `group`."""

    group: str = ""

    def gathered(self, x: Tensor) -> Tensor:
        return _Gather.apply(x.flatten(0, -2), self.size, self.group)[None]

    def summed(self, x: Tensor) -> Tensor:
        return _Sum.apply(x.flatten(0, -2), self.size, self.group)[None]

    def stacked(self, x: Tensor) -> Tensor:
        return _gather(x[None], self.size, self.group)

    def total(self, value: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(value, "sum", self.group))

    def whole(self, name: str, part: Tensor) -> Tensor:
        if not self.is_divided(name):
            return part
        whole = part.new_empty(self.whole_shape(name, part.shape))
        for rank, values in enumerate(self.stacked(part)):
            for block in TensorShard(rank, self.size).blocks(name, part.shape):
                rows = whole[block.row : block.row + block.length]
                if part.ndim > 1:
                    rows = rows[:, block.column : block.column + part.shape[1]]
                rows.copy_(values[block.at : block.at + block.length])
        return whole


def tensor_shard(world: World) -> TensorShard:
    """The part of the model that this rank has."""
    if world.tp_size == 1:
        return TensorShard()
    return TensorParallel(world.tp_rank, world.tp_size, world.tp_group.group_name)


def _gather(x: Tensor, size: int, group: str) -> Tensor:
    return collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), size, group))


def _sum(x: Tensor, size: int, group: str) -> Tensor:
    splits = [len(x) // size] * size
    terms = collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), splits, splits, group))
    wide = torch.promote_types(x.dtype, torch.float32)
    total = terms.unflatten(0, (size, -1)).sum(dim=0, dtype=wide)
    # under torch.compile in torch 2.11 a cast to the same dtype would make the gradient zero
    return total if x.dtype == wide else total.to(x.dtype)


class _Gather(torch.autograd.Function):
    """All-gather of positions; backward: reduce-scatter of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.ranks = size, group
        return _gather(x, size, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum(gradients[0], *ctx.ranks), None, None


class _Sum(torch.autograd.Function):
    """Reduce-scatter of positions; backward: all-gather of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.ranks = size, group
        return _sum(x, size, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradients[0], *ctx.ranks), None, None
