"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import Tensor, nn


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of `[…, dim]`, in float32 whatever the type of x, then scaled in it; and its scale, `[…, 1]` float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


class RMSNorm(nn.Module):
    """Normalises in float32, whatever the type of its input, and scales in that type, as the published models do."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.eps)[0]
