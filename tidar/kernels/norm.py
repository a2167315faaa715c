"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import Tensor, nn


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, `[…, dim]`, and its scale, `[…, 1]` float32. Normalizes in float32, weights in the dtype of x."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


class RMSNorm(nn.Module):
    """Normalizes in float32, and weights in the input's dtype, as the published models do."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.eps)[0]
