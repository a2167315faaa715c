"""Cross-entropy of rows of logits, and its gradient in their place, in one Triton kernel. Needs CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements that a program holds at a time, and its warps
BLOCK, WARPS = 8192, 16


def cross_entropy_(
    logits: Tensor, labels: Tensor, coefficients: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll `[n]`, correct `[n]`, and, in place of the logits, d sum(coefficients * nll) / d logits `[n, vocab]`.

    logits: `[n, vocab]`, rows contiguous; labels: `[n]` int64; coefficients: `[n]` float32. Computes in float32.
    """
    nll = torch.empty_like(coefficients)
    correct = torch.empty_like(labels, dtype=torch.bool)
    n, vocab = logits.shape
    if n:
        _cross_entropy_kernel[(n,)](
            logits, labels, coefficients, nll, correct, logits.stride(0), vocab, with_gradient, BLOCK, num_warps=WARPS
        )
    return nll, correct, logits if with_gradient else None


@triton.jit
def _cross_entropy_kernel(
    logits,
    labels,
    coefficients,
    nll,
    correct,
    stride,
    vocab: tl.constexpr,
    with_gradient: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes the normalizer of one row, then, while the row is in the cache, its arg-max and gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    label_logit = tl.load(logits + label).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    # each lane keeps its own maximum, so that no iteration waits for a reduction
    largest = tl.full([BLOCK], -3e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + lanes
        x = tl.load(logits + column, mask=column < vocab, other=-3e38).to(tl.float32)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    maximum = tl.max(largest)
    normalizer = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum)))
    coefficient = tl.load(coefficients + row)
    # the first of equal maxima, as in torch.argmax
    first = tl.full([BLOCK], vocab, tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + lanes
        inside = column < vocab
        x = tl.load(logits + column, mask=inside, other=-3e38).to(tl.float32)
        first = tl.minimum(first, tl.where((x == maximum) & inside, column, vocab))
        if with_gradient:
            gradient = (tl.exp(x - normalizer) - tl.where(column == label, 1.0, 0.0)) * coefficient
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(nll + row, normalizer - label_logit)
    tl.store(correct + row, tl.min(first) == label)
