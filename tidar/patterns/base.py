"""Base of the patterns: model input of packed rows, attention mask, and targets of the losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

# FlexAttention's mask_mod: index tensors (batch, head, query, key) -> bool tensor, true where the query sees the key
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# first key that each query sees and the one after the last, both [batch, queries] int32
KeyRange = tuple[Tensor, Tensor]

LOSSES = ("ar", "diffusion")
# document id of the padding at the end of a row
PADDING = -1
# query-key pairs that `dense_pieces` evaluates at once
PIECE = 2**24


@dataclass
class Blocks:
    """Random choices about each row's blocks.

    `size`: tokens per block. `offset`: number of tokens by which the first block of a document is shorter. Both
    `[batch, 1]` int32. `tokens`: the token of the row that each noisy position predicts or copies, -1 for none,
    `[batch, noisy positions]` int32; None where the noisy half has all tokens in order.
    """

    size: Tensor
    offset: Tensor
    tokens: Tensor | None = None


@dataclass
class Documents:
    """The documents of packed rows. Each run of equal ids in a row is one document.

    `index`: number of the document in its row; `position`: position of the token in its document; `end`: the token
    after the last of the document. All `[batch, seq_len]` int32. `packed`: whether any row holds several documents.
    `blocks`: None where the pattern draws nothing at random.
    """

    index: Tensor
    position: Tensor
    end: Tensor
    packed: bool
    blocks: Blocks | None = None

    @staticmethod
    def from_ids(document_ids: Tensor) -> "Documents":
        """document_ids: `[batch, seq_len]`, any integers."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        tokens = torch.arange(document_ids.shape[1], device=document_ids.device)
        first = torch.where(starts, tokens, 0).cummax(dim=1).values
        ends = torch.full_like(first, len(tokens))
        ends[:, :-1] = torch.where(starts[:, 1:], tokens[1:], len(tokens))
        return Documents(
            index=(starts.cumsum(dim=1) - 1).int(),
            position=(tokens - first).int(),
            end=ends.flip(1).cummin(dim=1).values.flip(1).int(),
            packed=bool(starts[:, 1:].any()),
        )

    @property
    def tokens(self) -> Tensor:
        """Indices of the tokens, 0, 1, 2 … in each row, `[batch, seq_len]` int32."""
        return torch.arange(self.index.shape[1], dtype=torch.int32, device=self.index.device).expand_as(self.index)

    @property
    def start(self) -> Tensor:
        """First token of each token's document, `[batch, seq_len]` int32."""
        return self.tokens - self.position


@dataclass
class Targets:
    """The `n` target tokens of one loss in a batch of rows.

    `index`: the model position that predicts each, an index into the flattened `[batch * positions]`, `[n]` int64.
    `labels`: the tokens, `[n]` int64. `weights`: their weights in the mean, `[n]` float32.
    `block_position`: position of each in its block, `[n]` int64; 0 where there are no blocks.
    """

    index: Tensor
    labels: Tensor
    weights: Tensor
    block_position: Tensor


@dataclass
class Share:
    """One rank's positions of a batch of rows of `length` model positions, under context parallelism.

    `positions`: the model position of each of its queries, -1 for an unused slot, `[batch, queries]` int64.
    `ranges`: first key and the one after the last of each range that a query sees, `[ranges, 2, batch, queries]` int32,
    over the shared keys of all ranks in the row's order and then its own private ones (see `RowSharding`); None where
    the mask is not made of ranges: then all positions are shared. `n_keys`: of each query, shared and private.
    The ranks' shared keys, `[keys, batch]` one rank after the other, have the indices `dealt` among all of them in the
    row's order, `[batch, keys]`, both flattened; `order` is the inverse. Both int64, of the shape that they index from.
    """

    length: int
    positions: Tensor
    ranges: Tensor | None
    n_keys: int
    order: Tensor
    dealt: Tensor

    @property
    def used(self) -> Tensor:
        return self.positions >= 0


@dataclass
class ModelBatch:
    """Model input and targets of a batch of rows.

    `input_ids`, `position_ids`: `[batch, positions]` int64. `targets`: by loss, in the order of the pattern's losses.
    `share`: where these are only a rank's positions of the rows; the documents are those of whole rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    targets: dict[str, Targets]
    share: Share | None = None

    @property
    def n_positions(self) -> int:
        """Model positions of all rows, unused slots not counted."""
        return self.input_ids.numel() if self.share is None else int(self.share.used.sum())


class Pattern(ABC):
    """Base class. Each pattern is one file.

    `losses`: those of LOSSES that it trains, in that order. `block_size`: largest number of positions in a block. The
    parameters of `__init__` are the options of the pattern; one with the name of an option of [tidar] gets its value.
    """

    losses: ClassVar[tuple[str, ...]] = LOSSES
    block_size: int = 1

    @abstractmethod
    def parts(self, seq_len: int) -> dict[str, int]:
        """The parts of the model's input for a row of `seq_len` tokens, in order: name, number of positions."""

    @abstractmethod
    def layout(
        self, tokens: Tensor, document_ids: Tensor, loss_mask: Tensor, seeds: Sequence[int] | None = None
    ) -> ModelBatch:
        """Model input and targets of rows.

        tokens, document_ids: `[batch, seq_len]` integers. loss_mask: `[batch, seq_len]`, weight of each token as a
        target. seeds: one per row (default: 0); everything random about a row is a function of its seed.
        """

    @abstractmethod
    def mask_mod(self, documents: Documents) -> MaskMod:
        """The mask over model positions, as FlexAttention's `mask_mod`. documents: those that `layout` returned."""

    def documents(self, document_ids: Tensor, seeds: Sequence[int] | None = None) -> Documents:
        """Everything that the mask of rows depends on. document_ids, seeds: as in `layout`."""
        return Documents.from_ids(document_ids)

    def model_positions(self, seq_len: int) -> int:
        """Number of model positions for a row of `seq_len` tokens."""
        return sum(self.parts(seq_len).values())

    def dense_mask(
        self, seq_len: int, document_ids: Tensor | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """The mask as a bool tensor, true where the query (row) sees the key (column).

        `[positions, positions]` for one document of `seq_len` tokens; `[batch, positions, positions]` for
        document ids `[batch, seq_len]`. Raises ValueError for document ids of another shape.
        """
        if document_ids is None:
            return self.dense_mask(seq_len, torch.zeros(1, seq_len, dtype=torch.long), seeds)[0]
        if document_ids.ndim != 2 or document_ids.shape[1] != seq_len:
            raise ValueError(f"document_ids has shape {list(document_ids.shape)}: must be [batch, {seq_len}]")
        positions = self.model_positions(seq_len)
        mask_mod = self.mask_mod(self.documents(document_ids, seeds))
        return create_mask(mask_mod, len(document_ids), None, positions, positions, device=document_ids.device)[:, 0]


def in_range(keys: KeyRange) -> MaskMod:
    """mask_mod under which each query sees one range of keys."""
    start, end = keys

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q] <= k) & (k < end[b, q])

    mask_mod.key_ranges = [keys]  # type: ignore[attr-defined]
    return mask_mod


def in_either(first: KeyRange, second: KeyRange) -> MaskMod:
    """mask_mod under which each query sees two ranges of keys. They must not overlap; start = end is an empty range."""
    first_start, first_end = first
    second_start, second_end = second

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_first = (first_start[b, q] <= k) & (k < first_end[b, q])
        return in_first | ((second_start[b, q] <= k) & (k < second_end[b, q]))

    mask_mod.key_ranges = [first, second]  # type: ignore[attr-defined]
    return mask_mod


def key_ranges(mask_mod: MaskMod) -> list[KeyRange] | None:
    """The ranges of a mask_mod made by `in_range` or `in_either`; None for any other."""
    return getattr(mask_mod, "key_ranges", None)


def dense_pieces(
    mask_mod: MaskMod, batch: int, n_queries: int, n_keys: int, device: torch.device, multiple: int = 1
) -> Iterator[Tensor]:
    """Evaluates a mask for some queries at a time: bool tensors `[batch, queries, n_keys]`, in order.

    multiple: divides the number of queries of each piece but the last.
    """
    step = max(PIECE // (batch * n_keys) // multiple, 1) * multiple
    for first in range(0, n_queries, step):
        queries = min(step, n_queries - first)

        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor, first: int = first) -> Tensor:
            return mask_mod(b, h, q + first, k)

        yield create_mask(shifted, batch, None, queries, n_keys, device=device)[:, 0]
