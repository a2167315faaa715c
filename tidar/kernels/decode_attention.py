"""Attention of a decoding step: few queries against a long cache, as Triton kernels. Needs CUDA.

A step of a small model is bound by the number of its kernels, so one of them does all between the projection and
attention: norms, rotary embeddings, and the cache's new keys and values. One query block cannot occupy a GPU, so the
keys are split over programs, whose results are combined afterwards (flash decoding). The query heads that share a
key/value head are rows of one block, so that each key is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.selection import count_sms

KEYS = 64  # keys of a tile
MAX_SPLITS = 64
COMBINED = 8192  # elements that a program of _combine holds


@torch.library.custom_op("tidar::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    heads: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    end: Tensor,
    own_start: Tensor,
    own_end: Tensor,
) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`, of slots 0 … end and own_start … own_end of a cache.

    heads: `[batch, queries, n_heads + 2 * n_kv_heads, head_dim]`, grouped as in `split_heads`, before their norms
    (weights `[head_dim]`, or None without norms) and rotation (cos, sin: `[batch, 1, queries, head_dim]`); head_dim is
    a power of two from 16. keys, values: the cache, `[batch, n_kv_heads, slots, head_dim]`, both of the same strides;
    those of the queries are first stored at `slots` `[batch, queries]`. end, own_start, own_end: exclusive ends and
    first slot of the second range, `[batch, queries]` int32; end must not be above own_start where the second range is
    not empty. `slots`, `end`, `own_start`, `own_end` and the weights must be contiguous, and so must each slot.
    Returns `[batch, queries, n_heads * head_dim]`.
    """
    batch, queries, all_heads, head_dim = heads.shape
    n_kv_heads = keys.shape[1]
    group = all_heads // n_kv_heads - 2
    n_heads = group * n_kv_heads
    rows = group * queries
    block = min(max(16, triton.next_power_of_2(rows)), 64)
    row_blocks = triton.cdiv(rows, block)
    programs = batch * n_kv_heads * row_blocks
    # two programs for each SM, as far as there are tiles of keys
    splits = min(MAX_SPLITS, max(1, 2 * (count_sms(heads.device) or 1) // programs), triton.cdiv(keys.shape[2], KEYS))
    q = heads.new_empty(batch, n_heads, queries, head_dim)
    out = heads.new_empty(batch, queries, n_heads * head_dim)
    partial = heads.new_empty(batch * n_kv_heads, splits, row_blocks * block, head_dim, dtype=torch.float32)
    sums = heads.new_empty(2, batch * n_kv_heads, splits, row_blocks * block, dtype=torch.float32)
    strides = keys.stride()[:3]
    sizes = dict(GROUP=group, QUERIES=queries, HEAD_DIM=head_dim, SPLITS=splits)
    _rotate_and_store[(batch * queries, all_heads)](
        heads.contiguous(), q_weight, k_weight, eps, cos.contiguous(), sin.contiguous(), slots, q, keys, values,
        *strides, GROUP=group, QUERIES=queries, HALF=head_dim // 2, num_warps=1,
    )  # fmt: skip
    _attend[(row_blocks, batch * n_kv_heads, splits)](
        q, keys, values, end, own_start, own_end, partial, sums, head_dim**-0.5 * 1.4426950408889634, *strides,
        n_kv_heads, KEYS=KEYS, BLOCK=block, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
        num_stages=3 if head_dim * q.itemsize <= 256 else 2, **sizes,
    )  # fmt: skip
    max_splits = triton.next_power_of_2(splits)
    combined = max(1, COMBINED // (max_splits * head_dim))
    _combine[(triton.cdiv(rows, combined), batch * n_kv_heads)](
        partial, sums, out, n_kv_heads, MAX_SPLITS=max_splits, ROWS=row_blocks * block, BLOCK=combined, **sizes
    )
    return out


@decode_attention.register_fake
def _(heads, q_weight, k_weight, eps, cos, sin, keys, values, slots, end, own_start, own_end):
    batch, queries, all_heads, head_dim = heads.shape
    return heads.new_empty(batch, queries, (all_heads - 2 * keys.shape[1]) * head_dim)


@triton.jit
def _rotate_and_store(
    heads_ptr, q_weight_ptr, k_weight_ptr, eps, cos_ptr, sin_ptr, slots_ptr, q_ptr, keys_ptr, values_ptr,
    cache_batch, cache_head, cache_slot,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one query: normalized and rotated, a value as it is, to `q` or to the cache."""
    at, head, all_heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, query = at // QUERIES, at % QUERIES
    kv_head, in_group = head // (GROUP + 2), head % (GROUP + 2)
    lanes = tl.arange(0, HALF)
    source = heads_ptr + (at * all_heads + head) * 2 * HALF + lanes
    first, second = tl.load(source), tl.load(source + HALF)
    slot = batch * cache_batch + kv_head * cache_head + tl.load(slots_ptr + at) * cache_slot + lanes
    if in_group == GROUP + 1:
        tl.store(values_ptr + slot, first)
        tl.store(values_ptr + slot + HALF, second)
    else:
        f, s = first.to(tl.float32), second.to(tl.float32)
        if q_weight_ptr is not None:
            scale = tl.rsqrt((tl.sum(f * f) + tl.sum(s * s)) / (2 * HALF) + eps)
            if in_group < GROUP:
                w1, w2 = tl.load(q_weight_ptr + lanes), tl.load(q_weight_ptr + HALF + lanes)
            else:
                w1, w2 = tl.load(k_weight_ptr + lanes), tl.load(k_weight_ptr + HALF + lanes)
            # rounded as RMSNorm rounds
            f = ((f * scale).to(first.dtype) * w1).to(tl.float32)
            s = ((s * scale).to(first.dtype) * w2).to(tl.float32)
        angle = at * 2 * HALF + lanes
        c1, c2 = tl.load(cos_ptr + angle).to(tl.float32), tl.load(cos_ptr + angle + HALF).to(tl.float32)
        s1, s2 = tl.load(sin_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle + HALF).to(tl.float32)
        rotated_first, rotated_second = (f * c1 - s * s1).to(first.dtype), (s * c2 + f * s2).to(first.dtype)
        if in_group == GROUP:
            tl.store(keys_ptr + slot, rotated_first)
            tl.store(keys_ptr + slot + HALF, rotated_second)
        else:
            n_heads = all_heads // (GROUP + 2) * GROUP
            target = q_ptr + ((batch * n_heads + kv_head * GROUP + in_group) * QUERIES + query) * 2 * HALF + lanes
            tl.store(target, rotated_first)
            tl.store(target + HALF, rotated_second)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, end_ptr, own_start_ptr, own_end_ptr, partial_ptr, sums_ptr, scale,
    cache_batch, cache_head, cache_slot, n_kv_heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows (query head in its group, query), one key/value head, every SPLITS-th tile of keys."""
    row_block, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
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
    k_ptr += batch * cache_batch + (head % n_kv_heads) * cache_head
    v_ptr += batch * cache_batch + (head % n_kv_heads) * cache_head

    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for tile in range(split, first_tiles + second_tiles, SPLITS):
        in_first = tile < first_tiles
        key = tl.where(in_first, tile * KEYS, second + (tile - first_tiles) * KEYS) + tl.arange(0, KEYS)
        start, stop = tl.where(in_first, 0, own_start), tl.where(in_first, end, own_end)
        seen = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        exists = key < tl.max(stop, axis=0)
        k = tl.load(k_ptr + key[None, :] * cache_slot + dim[:, None], mask=exists[None, :], other=0.0)
        scores = tl.where(seen, tl.dot(q, k, input_precision=PRECISION) * scale, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        # a row that has seen no key yet has no maximum
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(maximum - safe)
        v = tl.load(v_ptr + key[:, None] * cache_slot + dim[None, :], mask=exists[:, None], other=0.0)
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
    partial_ptr, sums_ptr, out_ptr, n_kv_heads,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits of BLOCK rows, weighted by their sums of exponentials."""
    row, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    batch, kv_head = head // n_kv_heads, head % n_kv_heads
    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    exists = (row < GROUP * QUERIES)[:, None] & (split < SPLITS)[None, :]
    at = (head * SPLITS + split)[None, :] * ROWS + row[:, None]
    maximum = tl.load(sums_ptr + at, mask=exists, other=-float("inf"))
    total = tl.load(sums_ptr + tl.num_programs(1) * SPLITS * ROWS + at, mask=exists, other=0.0)
    highest = tl.max(maximum, axis=1)
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.where(total > 0, tl.exp2(maximum - safe[:, None]), 0.0)
    partial = tl.load(partial_ptr + at[:, :, None] * HEAD_DIM + dim[None, None, :], mask=exists[:, :, None], other=0.0)
    out = tl.sum(partial * weights[:, :, None], axis=1) / tl.sum(total * weights, axis=1)[:, None]
    query, in_group = row % QUERIES, row // QUERIES
    n_heads = n_kv_heads * GROUP
    target = ((batch * QUERIES + query) * n_heads + kv_head * GROUP + in_group) * HEAD_DIM
    tl.store(out_ptr + target[:, None] + dim[None, :], out, mask=(row < GROUP * QUERIES)[:, None])
