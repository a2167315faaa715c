"""The mask of each batch as an attention backend wants it, made from the pattern's mask_mod."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from tidar.kernels.compiling import compiled
from tidar.models.attention import Mask
from tidar.patterns import Documents, KeyRange, MaskMod, Pattern, dense_pieces, key_ranges

# tile of a block mask, queries and keys: what FlexAttention skips or computes as a whole
TILE = 128

# what fits in half a word of `mask_of_words`, whose signs are bits 31 and 15
MAX_WORD, SIGNS = 2**15, -0x7FFF8000


class MaskBuilder:
    """The mask of each batch as `backend` ("flash", "flex" or "sdpa") wants it, to be shared by all layers.

    Built once per batch where rows are packed or blocks are drawn, else once per shape.
    """

    def __init__(self, pattern: Pattern, backend: str):
        self.pattern = pattern
        self.backend = backend
        self.unpacked: dict[tuple[int, int], Mask] = {}

    def __call__(self, documents: Documents) -> Mask:
        batch, seq_len = documents.index.shape
        if documents.packed or documents.blocks is not None:
            return self._build(documents)
        if (batch, seq_len) not in self.unpacked:
            self.unpacked[batch, seq_len] = self._build(documents)
        return self.unpacked[batch, seq_len]

    @torch.no_grad()
    def _build(self, documents: Documents) -> Mask:
        batch, seq_len = documents.index.shape
        positions = self.pattern.model_positions(seq_len)
        mask_mod, device = self.pattern.mask_mod(documents), documents.index.device
        if self.backend == "sdpa":
            return create_mask(mask_mod, batch, None, positions, positions, device=device)
        return build_block_mask(mask_mod, batch, positions, device, flash=self.backend == "flash")

    @torch.no_grad()
    def allowed_pairs(self, documents: Documents) -> Tensor:
        """Number of query-key pairs that the mask of a batch allows, scalar int64 on its device."""
        batch, seq_len = documents.index.shape
        positions = self.pattern.model_positions(seq_len)
        return count_pairs(self.pattern.mask_mod(documents), batch, positions, documents.index.device)


def build_block_mask(
    mask_mod: MaskMod, batch: int, positions: int, device: torch.device, flash: bool = False
) -> BlockMask:
    """The block mask of rows, tile TILE: directly where it is made of ranges of keys, else from all its points.

    flash: for FlashAttention-4's kernels.
    """
    ranges = key_ranges(mask_mod)
    if ranges is None:
        return block_mask_of_points(mask_mod, batch, positions, device)
    if flash and positions <= MAX_WORD and len(ranges) <= 2:
        mask_mod = mask_of_words(ranges)
    return block_mask_of_ranges(ranges, mask_mod)


def mask_of_words(ranges: list[KeyRange]) -> MaskMod:
    """The mask of one or two ranges with all four bounds of a query in one word, for at most MAX_WORD positions.

    Each half of a word, `(end - 1) << 16 - start`, becomes `(end - 1 - k) << 16 + (k - start)` with a key k: it is in
    the range where neither bit 31 nor bit 15, the signs of both, is set.

    FlashAttention-4 (4.0.0b36 on cutlass-dsl 4.8) otherwise loads all bounds anew for each pair of a tile that is
    partly allowed, behind a branch, and waits for them. A division before their use takes the loads out of there: one
    in front of each half, and `k // 65536`, which is 0. Shifts cannot be compiled there.
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


def block_mask_of_points(mask_mod: MaskMod, batch: int, positions: int, device: torch.device) -> BlockMask:
    """The block mask of any mask, evaluated at all its points."""
    # fused only when compiled; shapes stay static, for a symbolic block size cannot be traced through it (torch 2.11)
    create = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(mask_mod, batch, None, positions, positions, device=device, BLOCK_SIZE=TILE)


def block_mask_of_ranges(ranges: list[KeyRange], mask_mod: MaskMod, tile: int = TILE) -> BlockMask:
    """What `create_block_mask` gives, without evaluating the mask: O(positions + tiles²), no wait for the host.

    Some tens of operations on small tensors: what it costs is their launching.
    """
    counts = tile_counts(ranges, tile)[:, None]
    full = counts == tile * tile
    tiles = torch.stack([(counts > 0) & ~full, full])
    # for each tile of queries, and for each of keys: all tiles of the others, the true ones first, in order
    listed = torch.stack([tiles, tiles.mT])
    lengths = listed.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True).int()
    names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    names += ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices")
    lists = [*lengths.flatten(0, 1), *indices.flatten(0, 1)]
    positions = ranges[0][0].shape[1]
    return BlockMask(
        seq_lengths=(positions, positions),
        # each in memory of its own, whose start is aligned as kernels want it
        **{name: tensor.clone() for name, tensor in zip(names, lists)},
        BLOCK_SIZE=(tile, tile),
        mask_mod=mask_mod,
    )


def tile_counts(ranges: list[KeyRange], tile: int = TILE) -> Tensor:
    """Allowed pairs in each tile, `[batch, query tiles, key tiles]` int32. The last tiles may be cut off.

    The keys before a bound x that lie in a tile are x % tile in the tile of x, `tile` in all tiles before it and none
    after it; a range has those before its end without those before its start.
    """
    batch, positions = ranges[0][0].shape
    device = ranges[0][0].device
    tiles = -(-positions // tile)
    # where the row of tiles of each query begins, over all rows of the batch; a bound may lie after the last tile
    query = torch.arange(positions, device=device, dtype=torch.int32) // tile
    row = (torch.arange(batch, device=device, dtype=torch.int32)[:, None] * tiles + query) * (tiles + 1)
    bounds = torch.stack([torch.stack(kind) for kind in zip(*ranges)])  # starts and ends, ranges, batch, positions
    at = bounds // tile
    keys = torch.stack([bounds - at * tile, torch.full_like(bounds, tile)], dim=-1)
    keys[0].neg_()
    sums = torch.zeros(batch * tiles * (tiles + 1), 2, dtype=torch.int32, device=device)
    sums.index_add_(0, (row + at).flatten(), keys.view(-1, 2))
    own, later = sums.view(batch, tiles, tiles + 1, 2).unbind(dim=-1)
    later = later.sum(dim=2, keepdim=True) - later.cumsum(dim=2)
    return (own + later)[..., :-1].int()


def count_tiles(mask_mod: MaskMod, batch: int, positions: int, device: torch.device, tile: int = TILE) -> Tensor:
    """Allowed pairs in each tile of any mask, as of `tile_counts`, without holding all its points at one time."""
    ranges = key_ranges(mask_mod)
    if ranges is not None:
        return tile_counts(ranges, tile)
    tiles = -(-positions // tile)
    counts = []
    for piece in dense_pieces(mask_mod, batch, positions, device, multiple=tile):
        queries = piece.shape[1]
        padding = (0, tiles * tile - positions, 0, -queries % tile)
        cut = torch.nn.functional.pad(piece, padding).view(batch, -1, tile, tiles, tile)
        counts.append(cut.sum(dim=(2, 4), dtype=torch.int32))
    return torch.cat(counts, dim=1)


def count_pairs(mask_mod: MaskMod, batch: int, positions: int, device: torch.device) -> Tensor:
    """Allowed pairs of rows, scalar int64; at all points, a piece at a time, where the mask is not made of ranges."""
    ranges = key_ranges(mask_mod)
    if ranges is not None:
        return torch.stack([(end - start).sum() for start, end in ranges]).sum()
    if device.type == "cuda":
        return compiled(_count)(mask_mod, batch, positions, device)
    return torch.stack([piece.sum() for piece in dense_pieces(mask_mod, batch, positions, device)]).sum()


def _count(mask_mod: MaskMod, batch: int, positions: int, device: torch.device) -> Tensor:
    return create_mask(mask_mod, batch, None, positions, positions, device=device).sum()
