"""TiDAR with full masking (arXiv 2511.08923, section 3): a clean copy of each row, then a masked one.

The clean half is causal and trains the autoregressive loss. In the noisy half every token is the mask token; a block
of `block_size` positions sees all clean tokens before it and itself, both ways, and trains one-step drafting.

Worked example, one document of 6 tokens, blocks of 3 (rows are queries, columns keys):

    1 0 0 0 0 0  0 0 0 0 0 0
    1 1 0 0 0 0  0 0 0 0 0 0
    1 1 1 0 0 0  0 0 0 0 0 0
    1 1 1 1 0 0  0 0 0 0 0 0
    1 1 1 1 1 0  0 0 0 0 0 0
    1 1 1 1 1 1  0 0 0 0 0 0
    0 0 0 0 0 0  1 1 1 0 0 0
    0 0 0 0 0 0  1 1 1 0 0 0
    0 0 0 0 0 0  1 1 1 0 0 0
    1 1 1 0 0 0  0 0 0 1 1 1
    1 1 1 0 0 0  0 0 0 1 1 1
    1 1 1 0 0 0  0 0 0 1 1 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.patterns.base import Documents
from tidar.patterns.halves import TwoHalves


@dataclass
class Tidar(TwoHalves):
    def clean_end(self, documents: Documents) -> Tensor:
        return documents.tokens + 1

    def corrupt(
        self, is_target: Tensor, block_start: Tensor, documents: Documents, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return torch.ones_like(is_target), torch.ones_like(block_start)
