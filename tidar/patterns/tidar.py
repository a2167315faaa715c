"""TiDAR with full masking (arXiv 2511.08923, section 3): a clean copy of each row, then a masked one.

The clean half is causal and trains the autoregressive loss. In the masked half every token is the mask token; a block
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

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.patterns.base import Documents, MaskMod, ModelBatch, Pattern, Targets


@dataclass
class Tidar(Pattern):
    """block_size: tokens drafted together; the last block of a document may be shorter.
    mask_token_id: the token of the masked half, which only `layout` needs.
    """

    block_size: int = 8
    mask_token_id: int | None = None

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size}: must be at least 1")

    def model_positions(self, seq_len: int) -> int:
        return 2 * seq_len

    def layout(self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor) -> ModelBatch:
        seq_len = tokens.shape[1]
        tokens = tokens.long()
        documents = Documents.from_ids(document_ids)
        position = documents.position.long()
        # nothing predicts the first token of a document; the targets of both losses are the same tokens
        row, target = ((loss_mask > 0) & (position > 0)).nonzero(as_tuple=True)
        labels, weights, place = tokens[row, target], loss_mask[row, target].float(), position[row, target]
        clean = row * 2 * seq_len + target
        return ModelBatch(
            input_ids=torch.cat([tokens, torch.full_like(tokens, self.mask_token_id)], dim=1),
            position_ids=position.repeat(1, 2),
            documents=documents,
            targets={
                "ar": Targets(clean - 1, labels, weights, place % self.block_size),
                "diffusion": Targets(clean + seq_len, labels, weights, place % self.block_size),
            },
        )

    def mask_mod(self, documents: Documents) -> MaskMod:
        seq_len, block_size = documents.index.shape[1], self.block_size
        document, position = documents.index, documents.position

        def tidar_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q_masked, k_masked = q >= seq_len, k >= seq_len
            q_token, k_token = q % seq_len, k % seq_len
            q_position, k_position = position[b, q_token], position[b, k_token]
            q_block, k_block = q_position // block_size, k_position // block_size
            clean_to_clean = ~q_masked & ~k_masked & (k_position <= q_position)
            masked_to_clean = q_masked & ~k_masked & (k_block < q_block)
            masked_to_masked = q_masked & k_masked & (k_block == q_block)
            same_document = document[b, q_token] == document[b, k_token]
            return same_document & (clean_to_clean | masked_to_clean | masked_to_masked)

        return tidar_mask

    def allowed_pairs(self, lengths: Tensor) -> int:
        full, last = lengths // self.block_size, lengths % self.block_size
        clean_to_clean = lengths * (lengths + 1) // 2
        # full block m sees m blocks of clean tokens, the last, short one sees all full ones
        masked_to_clean = self.block_size**2 * (full * (full - 1) // 2) + last * full * self.block_size
        masked_to_masked = full * self.block_size**2 + last**2
        return int((clean_to_clean + masked_to_clean + masked_to_masked).sum())
