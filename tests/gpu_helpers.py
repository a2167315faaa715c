"""What tests of kernels on a GPU share."""

import pytest
import torch

from tidar.kernels import has_fast_products

CUDA = torch.device("cuda")
needs_quack = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_fast_products(CUDA, torch.bfloat16)),
    reason="quack is not installed, or this is no Hopper GPU",
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
