"""The compute dtype, and determinism."""

import os

import torch

from tidar.config import Config


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """dtype of training.mixed_precision_param; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def make_deterministic(config: Config) -> None:
    """Seeds this process and, where training.deterministic asks for it, forbids kernels that do not repeat."""
    torch.manual_seed(config.training.seed)
    if config.training.deterministic:
        # cuBLAS reads it when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
