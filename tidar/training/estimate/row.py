"""The work of a row of one document for a model."""

from typing import NamedTuple

import torch

from tidar.models import pattern_mask
from tidar.patterns import Pattern


class RowWork(NamedTuple):
    """positions: of the model. scored: positions that predict a token. pairs: of queries and keys that may see them."""

    positions: int
    scored: int
    pairs: int


def row_work(pattern: Pattern, seq_len: int) -> RowWork:
    """Work of a row that one document fills, the most that any row has."""
    row = torch.zeros(1, seq_len, dtype=torch.long)
    batch = pattern.layout(row, row, torch.ones_like(row))
    scored = sum(len(targets.labels) for targets in batch.targets.values())
    return RowWork(batch.n_positions, scored, int(pattern_mask(pattern, batch.documents).allowed_pairs()))
