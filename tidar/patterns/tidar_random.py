"""TiDAR with random instead of full masking (arXiv 2511.08923, Table 5).

Layout, mask and autoregressive loss are those of `tidar`. In the noisy half only some tokens of each block are masked
and predicted; the others stay visible. `tidar.patterns.halves.mask_at_random` has the schedule and its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tidar.patterns.base import Documents
from tidar.patterns.halves import mask_at_random
from tidar.patterns.tidar import Tidar


@dataclass
class TidarRandom(Tidar):
    def corrupt(
        self, is_target: Tensor, block_start: Tensor, documents: Documents, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return mask_at_random(is_target, block_start, documents, seeds)
