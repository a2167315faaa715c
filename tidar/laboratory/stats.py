"""Allowed pairs, tiles and FLOPs of a mask."""

from dataclasses import dataclass

import torch

from tidar.models import pattern_mask
from tidar.models.flops import ATTENTION_FLOPS
from tidar.patterns import TILE, Pattern

SEQ_LENS = [512 * 2**n for n in range(7)]
HEADER = (
    f"{'S':>6} {'positions':>9} {'allowed pairs':>15} {'of dense':>8}   "
    f"{'full':>6} {'partial':>7} {'empty':>6}   {'useful':>9} {'computed':>9} {'dense':>9}"
)


@dataclass
class MaskStats:
    """Counts for one row. `allowed`: query-key pairs. `full`, `partial`, `empty`: tiles of TILE x TILE with all, some
    and none of their pairs allowed; a smaller tile at the end is never full.
    """

    seq_len: int
    positions: int
    allowed: int
    full: int
    partial: int
    empty: int

    def line(self, heads: int, head_dim: int) -> str:
        """A table row under HEADER; the last three columns are TFLOPs of one layer, forward and backward."""
        tiles, dense = self.full + self.partial + self.empty, self.positions**2
        per_pair = ATTENTION_FLOPS * heads * head_dim / 1e12
        computed = (self.full + self.partial) * TILE**2
        shares = [f"{count / tiles:.1%}" for count in (self.full, self.partial, self.empty)]
        flops = [f"{pairs * per_pair:9.4f}" for pairs in (self.allowed, computed, dense)]
        return (
            f"{self.seq_len:>6} {self.positions:>9} {self.allowed:>15,} {self.allowed / dense:>8.1%}   "
            f"{shares[0]:>6} {shares[1]:>7} {shares[2]:>6}   {' '.join(flops)}"
        )


def mask_stats(pattern: Pattern, lengths: list[int], seed: int, device: torch.device) -> MaskStats:
    """The counts for a row with documents of these lengths. Memory grows with the tiles, not with the pairs."""
    seq_len = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(device)
    mask = pattern_mask(pattern, pattern.documents(ids, [seed]))
    counts = mask.tile_counts()
    full, empty = int((counts == TILE**2).sum()), int((counts == 0).sum())
    return MaskStats(seq_len, mask.n_keys, int(counts.sum()), full, counts.numel() - full - empty, empty)
