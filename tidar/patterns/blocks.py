"""Options of all patterns with blocks, and their random choices for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.config import UserError, derive_seed
from tidar.patterns.base import Blocks, Documents, Pattern


@dataclass
class BlockPattern(Pattern):
    """block_size: tokens drafted in one forward pass; the last block of a document may be shorter.
    mask_token_id: the token of masked positions; only `layout` needs it.
    block_sizes: each row draws one of these from its seed, instead of block_size.
    random_block_offset: the first block of every document of a row is shorter by a number drawn from the row's seed.
    place_weights: weight of each position in a block in the diffusion loss (default: uniform).
    """

    block_size: int = 8
    mask_token_id: int | None = None
    block_sizes: Sequence[int] = ()
    random_block_offset: bool = False
    place_weights: Sequence[float] = ()

    def __post_init__(self):
        if self.block_sizes:
            self.block_size = max(self.block_sizes)
        if self.block_size < 1 or (self.block_sizes and min(self.block_sizes) < 1):
            raise ValueError(f"block_size = {self.block_size}, block_sizes = {self.block_sizes}: must be at least 1")
        if self.place_weights and (len(self.place_weights) != self.block_size or not any(self.place_weights)):
            raise UserError(
                f"tidar.place_weights: {len(self.place_weights)} numbers, the largest {max(self.place_weights)}: must "
                f"be {self.block_size}, one for each position in the largest block, and one of them above 0"
            )

    def documents(self, document_ids: Tensor, seeds: Sequence[int] | None = None) -> Documents:
        documents = Documents.from_ids(document_ids)
        if self.block_sizes or self.random_block_offset:
            documents.blocks = self.draw_blocks(row_seeds(seeds, len(document_ids)), document_ids.device)
        return documents

    def draw_blocks(self, seeds: Sequence[int], device: torch.device) -> Blocks:
        """Draws the size and offset of each row's blocks."""
        sizes, offsets = [], []
        for seed in seeds:
            size = self.block_size
            if self.block_sizes:
                size = self.block_sizes[int(torch.randint(len(self.block_sizes), (), generator=draw(seed, "size")))]
            offset = int(torch.randint(size, (), generator=draw(seed, "offset"))) if self.random_block_offset else 0
            sizes.append([size])
            offsets.append([offset])
        return Blocks(*(torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (sizes, offsets)))

    def block_bounds(self, first: Tensor, index: Tensor, end: Tensor, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
        """First token of each token's block and the one after its last, `[batch, seq_len]` int32.

        The span that is divided into blocks begins at the token `first` and ends before `end`. index: of each token in
        its span.
        """
        if blocks is None:
            start = first + index // self.block_size * self.block_size
            return start, torch.minimum(start + self.block_size, end)
        start = first + (index + blocks.offset) // blocks.size * blocks.size - blocks.offset
        return torch.maximum(start, first), torch.minimum(start + blocks.size, end)

    def place_weight(self, block_position: Tensor) -> Tensor | float:
        """Weight of each position in a block, float32 of the shape of `block_position`."""
        if not self.place_weights:
            return 1.0
        return torch.tensor(self.place_weights, device=block_position.device)[block_position]


def row_seeds(seeds: Sequence[int] | None, n_rows: int) -> Sequence[int]:
    return [0] * n_rows if seeds is None else seeds


def draw(seed: int, purpose: str) -> torch.Generator:
    """Generator of a row's random numbers for one purpose, so that an option does not change the draws of others."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
