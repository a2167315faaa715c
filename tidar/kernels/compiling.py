"""torch.compile on first use: its compiler takes longer to import than everything else."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(function: Callable) -> Callable:
    """The function, compiled for each set of input shapes. Not for use inside compiled code."""
    return torch.compile(function, dynamic=False)
