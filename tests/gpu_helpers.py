"""What tests of kernels on a GPU share."""

import pytest
import torch

from tidar.config import load_config
from tidar.kernels import Sizes, choose_kernels

CUDA = torch.device("cuda")
# what a run here uses for sizes that all kernels can compute
KERNELS = choose_kernels(
    load_config([]), CUDA if torch.cuda.is_available() else torch.device("cpu"), torch.bfloat16, Sizes(64, 64, 128, 64)
)
needs_quack = pytest.mark.skipif(
    not KERNELS.loss_without_logits,
    reason="quack is not installed, or this is no Hopper GPU",
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
