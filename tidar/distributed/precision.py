"""The compute dtype, and determinism."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tidar.config import Config


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """dtype of training.mixed_precision_param; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


@contextmanager
def determinism(config: Config) -> Iterator[None]:
    """Seeds this process. Where training.deterministic asks for it, kernels that do not repeat are forbidden inside."""
    torch.manual_seed(config.training.seed)
    if not config.training.deterministic:
        yield
        return
    # cuBLAS reads it when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        # it sets Inductor's option too, as set_deterministic_debug_mode does not (torch 2.13)
        torch.use_deterministic_algorithms(before, warn_only=warns)
