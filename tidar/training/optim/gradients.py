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


def gradient_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Global norm of gradients, given this rank's shards; a float32 scalar on `device`.

    gradients: the local tensors; empty ones are allowed. group: the ranks across which one replica is sharded; the
    squares are summed over it.
    """
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()], dtype=torch.float32)
    square = torch.stack(norms).double().square().sum().to(device)
    if group.size() > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt().float()
