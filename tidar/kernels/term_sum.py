"""Sum of tensors in float32, in one pass: a Triton kernel. Needs CUDA."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


def sum_terms(total: Tensor, term: Tensor, others: Tensor) -> None:
    """Writes `term` (n) and the rows of `others` (terms, n), added in float32 in this order, to `total` (n)."""
    _sum_kernel[(triton.cdiv(len(total), BLOCK),)](total, term, others, len(total), len(others), BLOCK, num_warps=WARPS)


@triton.jit
def _sum_kernel(total, term, others, n, n_others, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < n
    value = tl.load(term + index, inside).to(tl.float32)
    other = others + index
    for _ in range(n_others):
        value += tl.load(other, inside).to(tl.float32)
        other += n
    tl.store(total + index, value, inside)
