"""TiDAR without doubling, as in the script that tidar.migrate reads: each document is clean first, then masked.

The first floor(clean_ratio * length) tokens of a document are clean and causal, and train the autoregressive loss: each
is predicted by the token before it. The others become the mask token. They see all clean tokens of their document and
their block, both ways, and train the diffusion loss. Blocks are counted from the first masked token.

Worked example, one document of 6 tokens, clean_ratio 0.5, blocks of 2 (rows are queries, columns keys):

    1 0 0  0 0 0
    1 1 0  0 0 0
    1 1 1  0 0 0
    1 1 1  1 1 0
    1 1 1  1 1 0
    1 1 1  0 0 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.config import UserError
from tidar.patterns.base import Documents, MaskMod, ModelBatch, Targets, in_either
from tidar.patterns.blocks import BlockPattern


@dataclass
class TidarSplit(BlockPattern):
    """clean_ratio: fraction of a document's tokens that stay clean, above 0 and below 1."""

    clean_ratio: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.clean_ratio < 1:
            raise UserError(f"tidar.clean_ratio = {self.clean_ratio}: must be number > 0 and < 1")

    def parts(self, seq_len: int) -> dict[str, int]:
        return {"row": seq_len}

    def _split(self, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
        """First masked token of each token's document, and bounds of each masked token's block."""
        start = documents.start
        # in float64 on every device, so that layout and mask agree
        first = start + ((documents.end - start).double() * self.clean_ratio).floor().int()
        return first, *self.block_bounds(first, documents.tokens - first, documents.end, documents.blocks)

    def layout(
        self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor, seeds: Sequence[int] | None = None
    ) -> ModelBatch:
        tokens = tokens.long()
        documents = self.documents(document_ids, seeds)
        first, block_start, _ = self._split(documents)
        is_masked = documents.tokens >= first
        # nothing predicts the first token of a document
        is_target = (loss_mask > 0) & (documents.position > 0)
        targets = {}
        for loss, kind, shift in (("ar", ~is_masked, -1), ("diffusion", is_masked, 0)):
            row, target = (is_target & kind).nonzero(as_tuple=True)
            at = row * tokens.shape[1] + target
            weights, block_position = loss_mask[row, target].float(), torch.zeros_like(at)
            if loss == "diffusion":
                block_position = (documents.tokens - block_start)[row, target].long()
                weights = weights * self.place_weight(block_position)
            targets[loss] = Targets(at + shift, tokens[row, target], weights, block_position)
        return ModelBatch(
            input_ids=torch.where(is_masked, self.mask_token_id, tokens),  # type: ignore[arg-type]
            position_ids=documents.position.long(),
            documents=documents,
            targets=targets,
        )

    def mask_mod(self, documents: Documents) -> MaskMod:
        start, tokens = documents.start, documents.tokens
        first, block_start, block_end = self._split(documents)
        is_masked = tokens >= first
        clean_keys = start, torch.where(is_masked, first, tokens + 1)
        return in_either(clean_keys, (torch.where(is_masked, block_start, 0), torch.where(is_masked, block_end, 0)))
