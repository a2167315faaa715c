"""Gradients, wherever they lie, and their norm."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradient(parameter: nn.Parameter, copies: Mapping[nn.Parameter, nn.Parameter]) -> Tensor:
    """This rank's part of a parameter's gradient; in the type of the copy that the model has computed with, if any.

    What several micro-batches have added up lies with the parameter itself, in float32.
    """
    gradient = parameter.grad
    if gradient is None and parameter in copies:
        gradient = copies[parameter].grad
    return local_part(gradient)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Norm of gradients, of which these are local parts, a float32 scalar on `device`.

    group: the ranks that a gradient is sharded over; others hold the same as they do.
    """
    norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()], dtype=torch.float32)
    square = torch.stack(norms).double().square().sum().to(device)
    if group.size() > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt().float()
