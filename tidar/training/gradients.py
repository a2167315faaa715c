"""The norm of sharded gradients."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Norm of the gradients of all parameters, a scalar on `device`.

    group: the ranks that a gradient is sharded over; others hold the same as they do.
    """
    gradients = [parameter.grad for parameter in parameters]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norms = torch._foreach_norm([gradient for gradient in local if gradient.numel()])
    square = torch.stack(norms).double().square().sum().to(device)
    if group.size() > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt().float()
