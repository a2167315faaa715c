"""Block diffusion, BD3-LM (Arriola et al. 2025, arXiv 2503.09573): a clean half, then a noisy one.

A noisy block sees the clean blocks before it and itself, both ways; a clean block sees the clean blocks up to itself,
both ways inside. There is no autoregressive loss. The schedule and its weights are those of
`tidar.patterns.halves.mask_at_random`, the linear schedule of the paper's likelihood bound. The paper's clipped
schedules, which draw t from a part of the range, are not implemented.

Worked example, one document of 4 tokens, blocks of 2 (rows are queries, columns keys):

    1 1 0 0  0 0 0 0
    1 1 0 0  0 0 0 0
    1 1 1 1  0 0 0 0
    1 1 1 1  0 0 0 0
    0 0 0 0  1 1 0 0
    0 0 0 0  1 1 0 0
    1 1 0 0  0 0 1 1
    1 1 0 0  0 0 1 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tidar.patterns.base import Documents
from tidar.patterns.halves import TwoHalves, mask_at_random


@dataclass
class BlockDiffusion(TwoHalves):
    losses = ("diffusion",)

    def clean_end(self, documents: Documents) -> Tensor:
        return self._bounds(documents)[1]

    def corrupt(
        self, is_target: Tensor, block_start: Tensor, documents: Documents, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return mask_at_random(is_target, block_start, documents, seeds)
