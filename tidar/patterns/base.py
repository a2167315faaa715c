"""What a pattern is: how documents become model input, which position sees which, and what is predicted where."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

# FlexAttention's mask_mod: (batch, head, query, key) index tensors -> bool tensor, true where the key is seen
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# document id of positions that belong to no document: the padding at the end of a row
PADDING = -1


@dataclass
class Documents:
    """Where the documents of packed rows lie. Each run of equal ids in a row is one document.

    `index` (number of the document in its row), `position` (place inside the document): both `[batch, seq_len]`, int32.
    `packed`: whether any row holds more than one.
    """

    index: Tensor
    position: Tensor
    packed: bool

    @staticmethod
    def from_ids(document_ids: Tensor) -> "Documents":
        """From ids `[batch, seq_len]`, any integers."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        places = torch.arange(document_ids.shape[1], device=document_ids.device)
        first = torch.where(starts, places, 0).cummax(dim=1).values
        return Documents(
            index=(starts.cumsum(dim=1) - 1).int(),
            position=(places - first).int(),
            packed=bool(starts[:, 1:].any()),
        )

    def lengths(self) -> Tensor:
        """Length of every document of the batch, `[documents]`, int64."""
        seq_len = self.index.shape[1]
        rows = torch.arange(len(self.index), device=self.index.device)[:, None]
        counts = torch.bincount((self.index + rows * seq_len).flatten())
        return counts[counts > 0]


@dataclass
class Targets:
    """What one loss predicts in a batch of rows: `n` target tokens.

    `index`: model position that predicts each, counted over the flattened `[batch * positions]`, `[n]` int64.
    `labels`: the tokens, `[n]` int64. `weights`: their weights in the mean, `[n]` float32.
    `place`: place of each in its block, `[n]` int64.
    """

    index: Tensor
    labels: Tensor
    weights: Tensor
    place: Tensor


@dataclass
class ModelBatch:
    """Rows as the model sees them.

    `input_ids`, `position_ids`: `[batch, positions]` int64. `targets`: by loss, "ar" and "diffusion".
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    targets: dict[str, Targets]


class Pattern(ABC):
    """Base of the patterns. One pattern is one file, which says all that is particular to it."""

    block_size: int

    @abstractmethod
    def model_positions(self, seq_len: int) -> int:
        """Positions that the model sees for a row of `seq_len` tokens."""

    @abstractmethod
    def layout(self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor) -> ModelBatch:
        """Model input and targets of rows.

        tokens, document_ids: `[batch, seq_len]` integers. loss_mask: `[batch, seq_len]`, weight of each as a target.
        """

    @abstractmethod
    def mask_mod(self, documents: Documents) -> MaskMod:
        """Who sees whom, over model positions, as FlexAttention's `mask_mod`."""

    @abstractmethod
    def allowed_pairs(self, lengths: Tensor) -> int:
        """Number of query-key pairs that the mask allows, over documents of these lengths, `[documents]`."""

    def dense_mask(self, seq_len: int, document_ids: Tensor | None = None) -> Tensor:
        """The mask as a bool tensor, true where the query (row) sees the key (column).

        `[positions, positions]` for one document of `seq_len` tokens; `[batch, positions, positions]` for
        document ids `[batch, seq_len]`. Raises ValueError where these have another shape.
        """
        if document_ids is None:
            return self.dense_mask(seq_len, torch.zeros(1, seq_len, dtype=torch.long))[0]
        if document_ids.ndim != 2 or document_ids.shape[1] != seq_len:
            raise ValueError(f"document_ids has shape {list(document_ids.shape)}: must be [batch, {seq_len}]")
        positions = self.model_positions(seq_len)
        mask_mod = self.mask_mod(Documents.from_ids(document_ids))
        return create_mask(mask_mod, len(document_ids), None, positions, positions, device=document_ids.device)[:, 0]
