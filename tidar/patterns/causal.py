"""Plain autoregressive training, the baseline: each token sees itself and those before it, and predicts the next."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.patterns.base import Documents, MaskMod, ModelBatch, Pattern, Targets, in_range


@dataclass
class Causal(Pattern):
    losses = ("ar",)

    def parts(self, seq_len: int) -> dict[str, int]:
        return {"row": seq_len}

    def layout(
        self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor, seeds: Sequence[int] | None = None
    ) -> ModelBatch:
        tokens = tokens.long()
        documents = self.documents(document_ids)
        row, target = ((loss_mask > 0) & (documents.position > 0)).nonzero(as_tuple=True)
        labels, weights = tokens[row, target], loss_mask[row, target].float()
        at = row * tokens.shape[1] + target - 1
        return ModelBatch(
            input_ids=tokens,
            position_ids=documents.position.long(),
            documents=documents,
            targets={"ar": Targets(at, labels, weights, torch.zeros_like(at))},
        )

    def mask_mod(self, documents: Documents) -> MaskMod:
        return in_range((documents.start, documents.tokens + 1))
