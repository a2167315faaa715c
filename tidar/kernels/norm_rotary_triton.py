"""Triton kernels of `tidar.kernels.norm_rotary`. They need CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.selection import count_sms

# norms: elements of a row for each warp, so that a program's registers hold them all, and warps of an SM, enough to
# keep the memory busy
WARP_ELEMENTS, WARPS = 1024, 32
# rotary embeddings: positions of one head that a program rotates, and its warps
POSITIONS, HEAD_WARPS = 16, 4


def norm_backward(d_out: Tensor, d_residual: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight. d_out, d_residual, x: contiguous `[n, dim]`; weight: `[dim]`; scale: float32 `[n]`."""
    n, dim = x.shape
    d_x = torch.empty_like(x)
    block = triton.next_power_of_2(dim)
    warps = min(max(2, block // WARP_ELEMENTS), WARPS)
    programs = min(n, WARPS // warps * count_sms(x.device))
    d_weights = x.new_empty(programs, dim, dtype=torch.float32)
    _norm_backward_kernel[(programs,)](
        d_out, d_residual, x, weight, scale, d_x, d_weights, n, dim, block, num_warps=warps
    )
    return d_x, d_weights.sum(dim=0).to(weight.dtype)


@triton.jit
def _norm_backward_kernel(
    d_out, d_residual, x, weight, scale, d_x, d_weights, n, dim: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows in strides of the number of programs, and the sum of their parts of the weight's gradient."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < dim
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, n, programs):
        at = row.to(tl.int64) * dim + lanes  # type: ignore[attr-defined]
        s = tl.load(scale + row)
        g = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * s
        residual = tl.load(d_residual + at, mask=inside, other=0.0).to(tl.float32)
        # the forward pass multiplied the rounded norm by the weight
        d_weight += g * normal.to(x.dtype.element_ty).to(tl.float32)
        g *= w
        mean = tl.sum(g * normal) / dim
        tl.store(d_x + at, (residual + s * (g - normal * mean)).to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weights + program * dim + lanes, d_weight, mask=inside)


def heads_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """d_q, d_k, d_v: `[batch, heads of each, positions, head_dim]`; cos, sin: `[batch or 1, 1, positions, head_dim]`,
    contiguous. Returns `[batch, positions, all heads, head_dim]`, grouped as in `split_heads`.
    """
    batch, _, positions, head_dim = d_q.shape
    d_q, d_k, d_v = (part if part.stride(-1) == 1 else part.contiguous() for part in (d_q, d_k, d_v))
    n_heads, n_kv_heads = d_q.shape[1], d_k.shape[1]
    all_heads = n_heads + 2 * n_kv_heads
    d_heads = d_q.new_empty(batch, positions, all_heads, head_dim)
    _heads_backward_kernel[(triton.cdiv(positions, POSITIONS), all_heads, batch)](
        *(d_q, d_k, d_v, cos, sin, d_heads),
        *(*d_q.stride()[:3], *d_k.stride()[:3], *d_v.stride()[:3]),
        *(0 if len(cos) == 1 else cos.stride(0), positions),
        *(n_heads // n_kv_heads, all_heads, head_dim // 2, triton.next_power_of_2(head_dim // 2), POSITIONS),
        num_warps=HEAD_WARPS,
    )
    return d_heads


@triton.jit
def _heads_backward_kernel(
    d_q,
    d_k,
    d_v,
    cos,
    sin,
    d_heads,
    q_batch,
    q_head,
    q_position,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    cos_batch,
    positions,
    queries: tl.constexpr,
    all_heads: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Some positions of one head: a query or key is rotated back, a value copied. queries: how many a group has."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group, in_group = head // (queries + 2), head % (queries + 2)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    inside = (position < positions) & (lanes < HALF)
    if in_group < queries:
        q_index = group * queries + in_group
        source = d_q + row * q_batch + q_index * q_head + position * q_position.to(tl.int64) + lanes
    elif in_group == queries:
        source = d_k + row * k_batch + group * k_head + position * k_position.to(tl.int64) + lanes
    else:
        source = d_v + row * v_batch + group * v_head + position * v_position.to(tl.int64) + lanes
    first = tl.load(source, mask=inside)
    second = tl.load(source + HALF, mask=inside)
    target = d_heads + ((row * positions + position) * all_heads + head) * (2 * HALF) + lanes
    if in_group <= queries:
        at = row * cos_batch + position * (2 * HALF) + lanes
        # rotated back by each half's own cosine and the other half's sine
        c1, c2 = tl.load(cos + at, mask=inside).to(tl.float32), tl.load(cos + at + HALF, mask=inside).to(tl.float32)
        s1, s2 = tl.load(sin + at, mask=inside).to(tl.float32), tl.load(sin + at + HALF, mask=inside).to(tl.float32)
        f, s = first.to(tl.float32), second.to(tl.float32)
        first = (f * c1 + s * s2).to(first.dtype)
        second = (s * c2 - f * s1).to(second.dtype)
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)
