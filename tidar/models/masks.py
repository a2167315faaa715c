"""Attention masks: block mask, dense mask and number of allowed pairs, from a mask_mod or from ranges of keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from tidar.kernels.compiling import compiled
from tidar.models.attention import KeySource, Mask
from tidar.patterns import (
    TILE,
    Documents,
    KeyRange,
    MaskMod,
    Pattern,
    Share,
    dense_pieces,
    in_either,
    in_range,
    key_ranges,
    shared_mask_mod,
)

Around = Callable[[Mask, Share], KeySource]

# what fits in half a word of `mask_of_words`, whose signs are bits 31 and 15
MAX_WORD, SIGNS = 2**15, -0x7FFF8000


@dataclass
class PointMask:
    """Which of `n_keys` keys each of `n_queries` queries sees, evaluated at all points.

    `mask_mod`: takes indices of rows below `batch`. `device`: of the tensors that it reads.
    """

    mask_mod: MaskMod
    batch: int
    n_queries: int
    n_keys: int
    device: torch.device

    def dense(self) -> Tensor:
        """`[batch, 1, n_queries, n_keys]` bool, true where the query sees the key."""
        return create_mask(self.mask_mod, self.batch, None, self.n_queries, self.n_keys, device=self.device)

    def block_mask(self, flash: bool = False, tile: int = TILE) -> BlockMask:
        """For FlexAttention; flash: for FlashAttention-4's kernels."""
        # fused only when compiled; shapes stay static, as torch 2.11 cannot trace it with a symbolic block size
        create = compiled(create_block_mask) if self.device.type == "cuda" else create_block_mask
        shape = self.batch, None, self.n_queries, self.n_keys
        return create(self.mask_mod, *shape, device=self.device, BLOCK_SIZE=tile)

    def allowed_pairs(self) -> Tensor:
        """Number of query-key pairs that are allowed, scalar int64 on the device."""
        if self.device.type == "cuda":
            return compiled(_count)(self.mask_mod, self.batch, self.n_queries, self.n_keys, self.device)
        return torch.stack([piece.sum() for piece in self._pieces()]).sum()

    def tile_counts(self, tile: int = TILE) -> Tensor:
        """Allowed pairs in each tile, `[batch, query tiles, key tiles]` int32. The last tiles may be smaller."""
        key_tiles = -(-self.n_keys // tile)
        counts = []
        for piece in self._pieces(multiple=tile):
            padding = (0, key_tiles * tile - self.n_keys, 0, -piece.shape[1] % tile)
            padded = F.pad(piece, padding).view(self.batch, -1, tile, key_tiles, tile)
            counts.append(padded.sum(dim=(2, 4), dtype=torch.int32))
        return torch.cat(counts, dim=1)

    def _pieces(self, multiple: int = 1):
        return dense_pieces(self.mask_mod, self.batch, self.n_queries, self.n_keys, self.device, multiple)


class RangeMask(PointMask):
    """Which of `n_keys` keys each query sees, as one or two ranges of keys.

    `ranges`: start and end of each, both `[batch, n_queries]` int32 and from 0 to `n_keys`. Those of a query must not
    overlap; a range with start = end is empty.
    """

    def __init__(self, ranges: list[KeyRange], n_keys: int):
        batch, n_queries = ranges[0][0].shape
        mask_mod = in_range(*ranges) if len(ranges) == 1 else in_either(*ranges)
        super().__init__(mask_mod, batch, n_queries, n_keys, ranges[0][0].device)
        self.ranges = ranges

    def queries_from(self, first: int) -> "RangeMask":
        """The mask of the queries from number `first` on."""
        return RangeMask([(start[:, first:], end[:, first:]) for start, end in self.ranges], self.n_keys)

    def dense(self) -> Tensor:
        keys = torch.arange(self.n_keys, dtype=torch.int32, device=self.device)
        seen = [(start[..., None] <= keys) & (keys < end[..., None]) for start, end in self.ranges]
        return torch.stack(seen).any(dim=0)[:, None] if len(seen) > 1 else seen[0][:, None]

    def block_mask(self, flash: bool = False, tile: int = TILE) -> BlockMask:
        """What `create_block_mask` returns, in O(queries + tiles²) and without waiting for the device.

        Some tens of operations on small tensors: its cost is their launches.
        """
        mask_mod = mask_of_words(self.ranges) if flash and self.n_keys <= MAX_WORD else self.mask_mod
        counts = self.tile_counts(tile)[:, None]
        full = counts == tile * tile
        tiles = torch.stack([(counts > 0) & ~full, full])
        n_query_tiles, n_key_tiles = tiles.shape[-2:]
        if n_query_tiles != n_key_tiles:
            # to a square, so that one call lists both ways; padding is false and is listed last
            side = max(n_query_tiles, n_key_tiles)
            tiles = F.pad(tiles, (0, side - n_key_tiles, 0, side - n_query_tiles))
        # for each tile of queries, and for each of keys: all tiles of the others, the true ones first, in order
        listed = torch.stack([tiles, tiles.mT])
        lengths = listed.sum(dim=-1, dtype=torch.int32)
        indices = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True).int()
        lists: dict[str, Any] = {}
        for of, (rows, columns) in enumerate([(n_query_tiles, n_key_tiles), (n_key_tiles, n_query_tiles)]):
            for kind, name in enumerate(("", "full_")):
                name += ("kv", "q")[of]
                # each in its own memory, aligned as kernels require
                lists[f"{name}_num_blocks"] = lengths[of, kind, ..., :rows].clone(memory_format=torch.contiguous_format)
                lists[f"{name}_indices"] = indices[of, kind, ..., :rows, :columns].clone(
                    memory_format=torch.contiguous_format
                )
        return BlockMask(seq_lengths=(self.n_queries, self.n_keys), **lists, BLOCK_SIZE=(tile, tile), mask_mod=mask_mod)

    def allowed_pairs(self) -> Tensor:
        return torch.stack([(end - start).sum() for start, end in self.ranges]).sum()

    def tile_counts(self, tile: int = TILE) -> Tensor:
        """See `PointMask`.

        The number of keys before a bound x is x % tile in the tile of x, `tile` in each tile before it and 0 after it;
        a range has those before its end minus those before its start.
        """
        query_tiles, key_tiles = -(-self.n_queries // tile), -(-self.n_keys // tile)
        # index of the first tile of each query's row of tiles, in the flat `sums`; a bound may be after the last tile
        query = torch.arange(self.n_queries, device=self.device, dtype=torch.int32) // tile
        batch = torch.arange(self.batch, device=self.device, dtype=torch.int32)[:, None]
        row = (batch * query_tiles + query) * (key_tiles + 1)
        # starts and ends, ranges, batch, queries
        bounds = torch.stack([torch.stack(kind) for kind in zip(*self.ranges)])
        at = bounds // tile
        keys = torch.stack([bounds - at * tile, torch.full_like(bounds, tile)], dim=-1)
        keys[0].neg_()
        sums = torch.zeros(self.batch * query_tiles * (key_tiles + 1), 2, dtype=torch.int32, device=self.device)
        sums.index_add_(0, (row + at).flatten(), keys.view(-1, 2))
        own, later = sums.view(self.batch, query_tiles, key_tiles + 1, 2).unbind(dim=-1)
        later = later.sum(dim=2, keepdim=True) - later.cumsum(dim=2)
        return (own + later)[..., :-1].int()


def make_mask(mask_mod: MaskMod, batch: int, n_queries: int, n_keys: int, device: torch.device) -> PointMask:
    """A RangeMask where `mask_mod` is made of ranges of keys, else a PointMask."""
    ranges = key_ranges(mask_mod)
    return PointMask(mask_mod, batch, n_queries, n_keys, device) if ranges is None else RangeMask(ranges, n_keys)


def pattern_mask(pattern: Pattern, documents: Documents, share: Share | None = None) -> PointMask:
    """The mask of rows under a pattern, over model positions. share: a rank's queries and keys only."""
    batch, seq_len = documents.index.shape
    if share is not None:
        if share.ranges is not None:
            return RangeMask([(start, end) for start, end in share.ranges], share.n_keys)
        mask_mod = shared_mask_mod(pattern.mask_mod(documents), share.positions)
        return PointMask(mask_mod, batch, share.positions.shape[1], share.n_keys, documents.index.device)
    positions = pattern.model_positions(seq_len)
    return make_mask(pattern.mask_mod(documents), batch, positions, positions, documents.index.device)


def count_pairs(mask: PointMask, share: Share | None) -> Tensor:
    """Number of query-key pairs that `pattern_mask` allows, scalar int64; those of unused slots are not counted."""
    pairs = mask.allowed_pairs()
    return pairs if share is None else pairs - (~share.used).sum()


class BatchMask:
    """The mask of one batch, shared by all layers.

    `attention`: what the layers attend to, with the mask in the form that the backend takes.
    """

    def __init__(self, mask: PointMask, backend: str, share: Share | None = None, around: Around | None = None):
        self.mask, self.share = mask, share
        form: Mask = mask.dense() if backend == "sdpa" else mask.block_mask(flash=backend == "flash")
        self.attention: Any = around(form, share) if around and share else form

    @cached_property
    def allowed_pairs(self) -> Tensor:
        """Number of query-key pairs, scalar int64; those of unused slots are not counted."""
        return count_pairs(self.mask, self.share)


class MaskBuilder:
    """Builds the mask of each batch for `backend` ("flash", "flex" or "sdpa").

    Once per batch where rows are packed or blocks are drawn, else once per shape.
    """

    def __init__(self, pattern: Pattern, backend: str, around: Around | None = None):
        """around: what the layers get in place of a mask, made of it and the share."""
        self.pattern = pattern
        self.backend = backend
        self.around = around
        self.unpacked: dict[tuple[int, ...], BatchMask] = {}

    @torch.no_grad()
    def __call__(self, documents: Documents, share: Share | None = None) -> BatchMask:
        """share: as in `pattern_mask`, always of the same rank."""
        if documents.packed or documents.blocks is not None:
            return self._build(documents, share)
        shape = tuple(documents.index.shape)
        if shape not in self.unpacked:
            self.unpacked[shape] = self._build(documents, share)
        return self.unpacked[shape]

    def _build(self, documents: Documents, share: Share | None) -> BatchMask:
        return BatchMask(pattern_mask(self.pattern, documents, share), self.backend, share, self.around)


def mask_of_words(ranges: list[KeyRange]) -> MaskMod:
    """mask_mod of one or two ranges, with all four bounds of a query in one 64-bit word, for at most MAX_WORD keys.

    Each half of a word, `(end - 1) << 16 - start`, becomes `(end - 1 - k) << 16 + (k - start)` with a key k. The
    key is in the range where neither bit 31 nor bit 15, the signs of both, is set.

    FlashAttention-4 (4.0.0b36 on cutlass-dsl 4.8) otherwise loads all bounds again for each pair of a tile that is
    partly allowed, after a branch, and waits for them. A division before their use moves the loads out of the branch:
    one before each half, and `k // 65536`, which is 0. Shifts cannot be compiled there.
    """
    first, second = (_half_words(*keys) for keys in (ranges + [(torch.zeros_like(ranges[0][0]),) * 2])[:2])
    words = (second << 32) | (first & 0xFFFFFFFF)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        word = words[b, q]
        of_key = k * (1 - 2**16) + k // 2**16
        in_first = ((word.to(torch.int32) + of_key) & SIGNS) == 0
        return in_first | ((((word // 2**32).to(torch.int32) + of_key) & SIGNS) == 0)

    return mask_mod


def _half_words(start: Tensor, end: Tensor) -> Tensor:
    return (end.long() - 1) * 2**16 - start.long()


def _count(mask_mod: MaskMod, batch: int, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    return create_mask(mask_mod, batch, None, n_queries, n_keys, device=device).sum()
