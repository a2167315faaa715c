"""What a pattern is: how documents become model input, which position sees which, and what is predicted where."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

# FlexAttention's mask_mod: (batch, head, query, key) index tensors -> bool tensor, true where the key is seen
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# of each query, the first key that it sees and the one after the last, both [batch, positions] int32
KeyRange = tuple[Tensor, Tensor]

LOSSES = ("ar", "diffusion")
# document id of positions that belong to no document: the padding at the end of a row
PADDING = -1
# pairs of a dense evaluation at one time
PIECE = 2**24


@dataclass
class Blocks:
    """What was drawn of each row's blocks, where a pattern draws any of it.

    `size`: tokens of a block; `offset`: how many fewer the first block of a document has: both `[batch, 1]`, int32.
    `tokens`: the token of its row that each noisy position stands for, -1 where it stands for none,
    `[batch, noisy positions]` int32; None where they stand for all tokens in order.
    """

    size: Tensor
    offset: Tensor
    tokens: Tensor | None = None


@dataclass
class Documents:
    """Where the documents of packed rows lie. Each run of equal ids in a row is one document.

    `index` (number of the document in its row), `position` (place inside the document), `end` (the token after the
    document's last): all `[batch, seq_len]`, int32. `packed`: whether any row holds more than one. `blocks`: what the
    pattern has drawn, None where it draws nothing.
    """

    index: Tensor
    position: Tensor
    end: Tensor
    packed: bool
    blocks: Blocks | None = None

    @staticmethod
    def from_ids(document_ids: Tensor) -> "Documents":
        """From ids `[batch, seq_len]`, any integers."""
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        places = torch.arange(document_ids.shape[1], device=document_ids.device)
        first = torch.where(starts, places, 0).cummax(dim=1).values
        ends = torch.full_like(first, len(places))
        ends[:, :-1] = torch.where(starts[:, 1:], places[1:], len(places))
        return Documents(
            index=(starts.cumsum(dim=1) - 1).int(),
            position=(places - first).int(),
            end=ends.flip(1).cummin(dim=1).values.flip(1).int(),
            packed=bool(starts[:, 1:].any()),
        )

    @property
    def tokens(self) -> Tensor:
        """0, 1, 2 … of each row, `[batch, seq_len]` int32."""
        return torch.arange(self.index.shape[1], dtype=torch.int32, device=self.index.device).expand_as(self.index)

    @property
    def start(self) -> Tensor:
        """First token of each token's document, `[batch, seq_len]` int32."""
        return self.tokens - self.position


@dataclass
class Targets:
    """What one loss predicts in a batch of rows: `n` target tokens.

    `index`: model position that predicts each, counted over the flattened `[batch * positions]`, `[n]` int64.
    `labels`: the tokens, `[n]` int64. `weights`: their weights in the mean, `[n]` float32.
    `place`: place of each in its block, `[n]` int64; 0 where there are no blocks.
    """

    index: Tensor
    labels: Tensor
    weights: Tensor
    place: Tensor


@dataclass
class ModelBatch:
    """Rows as the model sees them.

    `input_ids`, `position_ids`: `[batch, positions]` int64. `targets`: by loss, those of the pattern's losses in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    targets: dict[str, Targets]


class Pattern(ABC):
    """Base of the patterns. One pattern is one file, which says all that is particular to it.

    `losses`: those of LOSSES that it trains, in that order. `block_size`: places that a block has at most. What else a
    pattern can be told are the parameters of its `__init__`; those named as an option of [tidar] get its value.
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

        tokens, document_ids: `[batch, seq_len]` integers. loss_mask: `[batch, seq_len]`, weight of each as a target.
        seeds: one for each row, of which all that is random about it is a function; by default 0.
        """

    @abstractmethod
    def mask_mod(self, documents: Documents) -> MaskMod:
        """Who sees whom, over model positions, as FlexAttention's `mask_mod`. documents: as `layout` has returned."""

    def documents(self, document_ids: Tensor, seeds: Sequence[int] | None = None) -> Documents:
        """All that the mask of rows depends on. document_ids, seeds: as of `layout`."""
        return Documents.from_ids(document_ids)

    def model_positions(self, seq_len: int) -> int:
        """Positions that the model sees for a row of `seq_len` tokens."""
        return sum(self.parts(seq_len).values())

    def dense_mask(
        self, seq_len: int, document_ids: Tensor | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """The mask as a bool tensor, true where the query (row) sees the key (column).

        `[positions, positions]` for one document of `seq_len` tokens; `[batch, positions, positions]` for
        document ids `[batch, seq_len]`. Raises ValueError where these have another shape.
        """
        if document_ids is None:
            return self.dense_mask(seq_len, torch.zeros(1, seq_len, dtype=torch.long), seeds)[0]
        if document_ids.ndim != 2 or document_ids.shape[1] != seq_len:
            raise ValueError(f"document_ids has shape {list(document_ids.shape)}: must be [batch, {seq_len}]")
        positions = self.model_positions(seq_len)
        mask_mod = self.mask_mod(self.documents(document_ids, seeds))
        return create_mask(mask_mod, len(document_ids), None, positions, positions, device=document_ids.device)[:, 0]


def in_range(keys: KeyRange) -> MaskMod:
    """The mask of queries that see one range of keys each."""
    start, end = keys

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q] <= k) & (k < end[b, q])

    mask_mod.key_ranges = [keys]
    return mask_mod


def in_either(first: KeyRange, second: KeyRange) -> MaskMod:
    """The mask of queries that see two ranges of keys each, which must not overlap; where start = end it is empty."""
    first_start, first_end = first
    second_start, second_end = second

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_first = (first_start[b, q] <= k) & (k < first_end[b, q])
        return in_first | ((second_start[b, q] <= k) & (k < second_end[b, q]))

    mask_mod.key_ranges = [first, second]
    return mask_mod


def key_ranges(mask_mod: MaskMod) -> list[KeyRange] | None:
    """The ranges that a mask was made of, by `in_range` or `in_either`; None for any other mask."""
    return getattr(mask_mod, "key_ranges", None)


def dense_pieces(
    mask_mod: MaskMod, batch: int, n_queries: int, n_keys: int, device: torch.device, multiple: int = 1
) -> Iterator[Tensor]:
    """The mask, evaluated for some queries at a time: bool tensors `[batch, queries, n_keys]`, in order.

    multiple: divides the number of queries of each piece but the last.
    """
    step = max(PIECE // (batch * n_keys) // multiple, 1) * multiple
    for first in range(0, n_queries, step):
        queries = min(step, n_queries - first)

        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor, first: int = first) -> Tensor:
            return mask_mod(b, h, q + first, k)

        yield create_mask(shifted, batch, None, queries, n_keys, device=device)[:, 0]
