"""torch.compile where it is first needed: its compiler takes longer to import than all the rest."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(function: Callable) -> Callable:
    """The function, compiled for each set of shapes that it is called with. Not to be called in compiled code."""
    return torch.compile(function, dynamic=False)
