"""Local gradients and their global norm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradient(parameter: nn.Parameter, copies: Mapping[nn.Parameter, nn.Parameter]) -> Tensor:
    """This rank's shard of a parameter's gradient.

    copies: master parameter -> its copy in the compute dtype; may be empty. After a single micro-batch the gradient is
    in the copy's `.grad`, in the compute dtype; accumulated over several, it is in the master parameter's `.grad`, in
    float32.
    """
    gradient: Any = parameter.grad
    if gradient is None and parameter in copies:
        gradient = copies[parameter].grad
    return local_part(gradient)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(gradients: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Sums the gradients of parameters that all ranks of tensor parallelism have, in place and in float32: each rank
    has the gradients of its positions, or of its heads.
    """
    flat = torch.cat([gradient.flatten().float() for gradient in gradients]).to(device)
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(total.view_as(gradient))


def gradient_norm(gradients: Sequence[Tensor], groups: Sequence[dist.ProcessGroup], device: torch.device) -> Tensor:
    """Global norm of gradients, given this rank's shards; a float32 scalar on `device`.

    gradients: the local tensors; empty ones are allowed. groups: along the dimensions of the ranks that one replica is
    divided over; the squares are summed over each.
    """
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()], dtype=torch.float32)
    square = torch.stack(norms).double().square().sum().to(device)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(square, group=group)
    return square.sqrt().float()
