"""Attention of a decoding step: few queries against a long cache, as a Triton kernel. Needs CUDA.

One query block cannot occupy a GPU, so the keys are split over programs, whose results are combined afterwards
(flash decoding). The query heads that share a key/value head are rows of one block, so that each key is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.selection import count_sms

KEYS = 64  # keys of a tile
MAX_SPLITS = 64


@torch.library.custom_op("tidar::decode_attention", mutates_args=())
def decode_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor, own_start: Tensor, own_end: Tensor) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`, of keys 0 … end and own_start … own_end.

    q: `[batch, n_heads, queries, head_dim]`; k, v: `[batch, n_kv_heads, keys, head_dim]`, head_dim a power of two from
    16. end, own_start, own_end: exclusive ends and first key of the second range, `[batch, queries]` int32; end must
    not be above own_start where the second range is not empty. Returns q's shape.
    """
    batch, n_heads, queries, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    rows = group * queries
    block = min(max(16, triton.next_power_of_2(rows)), 64)
    row_blocks = triton.cdiv(rows, block)
    programs = batch * n_kv_heads * row_blocks
    # two programs for each SM, as far as there are tiles of keys
    splits = min(MAX_SPLITS, max(1, 2 * (count_sms(q.device) or 1) // programs), triton.cdiv(k.shape[2], KEYS))
    q = q.contiguous()
    out = torch.empty_like(q)
    partial = torch.empty(
        batch * n_kv_heads, splits, row_blocks * block, head_dim, dtype=torch.float32, device=q.device
    )
    sums = torch.empty(2, batch * n_kv_heads, splits, row_blocks * block, dtype=torch.float32, device=q.device)
    sizes = dict(GROUP=group, QUERIES=queries, HEAD_DIM=head_dim, BLOCK=block, SPLITS=splits)
    _attend[(row_blocks, batch * n_kv_heads, splits)](
        q, k, v, end, own_start, own_end, partial, sums, head_dim**-0.5 * 1.4426950408889634,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), n_kv_heads,
        KEYS=KEYS, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4, **sizes,
    )  # fmt: skip
    _combine[(rows, batch * n_kv_heads)](
        partial, sums, out, MAX_SPLITS=triton.next_power_of_2(splits), ROWS=row_blocks * block, **sizes
    )
    return out


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, end: Tensor, own_start: Tensor, own_end: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, end_ptr, own_start_ptr, own_end_ptr, partial_ptr, sums_ptr, scale,
    k_batch, k_head, k_key, v_batch, v_head, v_key, n_kv_heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows (query head in its group, query), one key/value head, every SPLITS-th tile of keys."""
    row_block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = head // n_kv_heads
    row = row_block * BLOCK + tl.arange(0, BLOCK)
    real = row < GROUP * QUERIES
    query = row % QUERIES
    dim = tl.arange(0, HEAD_DIM)
    # rows of one key/value head are contiguous in q: [batch, n_kv_heads, group, queries, head_dim]
    q = tl.load(
        q_ptr + (head * GROUP * QUERIES + row)[:, None] * HEAD_DIM + dim[None, :], mask=real[:, None], other=0.0
    )
    end = tl.load(end_ptr + batch * QUERIES + query, mask=real, other=0)
    own_start = tl.load(own_start_ptr + batch * QUERIES + query, mask=real, other=0)
    own_end = tl.load(own_end_ptr + batch * QUERIES + query, mask=real, other=0)
    # tiles from the first key on, then tiles from the first key of the second ranges on
    first_tiles = tl.cdiv(tl.max(end, axis=0), KEYS)
    second = tl.min(tl.where(own_end > own_start, own_start, 2147483647), axis=0)
    second_tiles = tl.cdiv(tl.maximum(tl.max(own_end, axis=0) - second, 0), KEYS)
    k_ptr += batch * k_batch + (head % n_kv_heads) * k_head
    v_ptr += batch * v_batch + (head % n_kv_heads) * v_head

    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for tile in range(split, first_tiles + second_tiles, SPLITS):
        in_first = tile < first_tiles
        key = tl.where(in_first, tile * KEYS, second + (tile - first_tiles) * KEYS) + tl.arange(0, KEYS)
        start, stop = tl.where(in_first, 0, own_start), tl.where(in_first, end, own_end)
        seen = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        exists = key < tl.max(stop, axis=0)
        k = tl.load(k_ptr + key[None, :] * k_key + dim[:, None], mask=exists[None, :], other=0.0)
        scores = tl.where(seen, tl.dot(q, k, input_precision=PRECISION) * scale, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        # a row that has seen no key yet has no maximum
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(maximum - safe)
        v = tl.load(v_ptr + key[:, None] * v_key + dim[None, :], mask=exists[:, None], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, axis=1)
        maximum = higher

    padded = tl.num_programs(0) * BLOCK
    at = (head * SPLITS + split) * padded + row
    tl.store(partial_ptr + at[:, None] * HEAD_DIM + dim[None, :], sums)
    tl.store(sums_ptr + at, maximum)
    tl.store(sums_ptr + tl.num_programs(1) * SPLITS * padded + at, total)


@triton.jit
def _combine(
    partial_ptr, sums_ptr, out_ptr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The splits of one row, weighted by their sums of exponentials."""
    row, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    exists = split < SPLITS
    at = (head * SPLITS + split) * ROWS + row
    maximum = tl.load(sums_ptr + at, mask=exists, other=-float("inf"))
    total = tl.load(sums_ptr + tl.num_programs(1) * SPLITS * ROWS + at, mask=exists, other=0.0)
    highest = tl.max(maximum, axis=0)
    weights = tl.where(total > 0, tl.exp2(maximum - tl.where(highest == -float("inf"), 0.0, highest)), 0.0)
    partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=exists[:, None], other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(out_ptr + (head * GROUP * QUERIES + row) * HEAD_DIM + dim, out)
