"""Cross-entropy of rows of logits, and its gradient in their place, in one Triton kernel. Needs CUDA.

Where ranks have parts of the vocabulary, a kernel summarizes this rank's part of each row, and, once the ranks have
exchanged their summaries, another writes the gradient.
"""

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
            *(logits, labels, coefficients, nll, correct, None),
            *(logits.stride(0), vocab, with_gradient, BLOCK),
            num_warps=WARPS,
        )
    return nll, correct, logits if with_gradient else None


def summary(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """`[4, n]`: largest logit, sum of the exponentials relative to it, the label's logit, or 0 where it is another
    rank's, and whether the label's is the first of the largest.

    logits: `[n, columns]` of this rank, rows contiguous; labels: `[n]` int64, relative to its first column; dtype:
    float32.
    """
    n, columns = logits.shape
    values = torch.empty(4, n, dtype=dtype, device=logits.device)
    if n:
        _cross_entropy_kernel[(n,)](
            logits, labels, None, None, None, values, logits.stride(0), columns, False, BLOCK, num_warps=WARPS
        )
    return values


def d_logits_(logits: Tensor, labels: Tensor, coefficients: Tensor, normalizer: Tensor) -> Tensor:
    """The gradient of sum(coefficients * nll) in place of the logits. normalizer: `[n]` float32, of whole rows; the
    rest as above.
    """
    n, columns = logits.shape
    if n:
        _gradient_kernel[(n,)](
            logits, labels, coefficients, normalizer, logits.stride(0), columns, BLOCK, num_warps=WARPS
        )
    return logits


@triton.jit
def _cross_entropy_kernel(
    logits,
    labels,
    coefficients,
    nll,
    correct,
    summary,
    stride,
    vocab: tl.constexpr,
    with_gradient: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes the normalizer of one row, then, while the row is in the cache, its arg-max and gradient.

    It writes nll and correct, or the summary of a part of the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    label_logit = tl.load(logits + label, mask=(label >= 0) & (label < vocab), other=0.0).to(tl.float32)
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
    sum_relative = tl.sum(total * tl.exp(largest - maximum))
    normalizer = maximum + tl.log(sum_relative)
    if with_gradient:
        coefficient = tl.load(coefficients + row)
    # the first of equal maxima, as in torch.argmax
    first = tl.full([BLOCK], vocab, tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + lanes
        inside = column < vocab
        x = tl.load(logits + column, mask=inside, other=-3e38).to(tl.float32)
        first = tl.minimum(first, tl.where((x == maximum) & inside, column, vocab))
        if with_gradient:
            gradient = _d_logits(x, column, label, normalizer, coefficient)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
    is_first = tl.min(first) == label
    if summary is None:
        tl.store(nll + row, normalizer - label_logit)
        tl.store(correct + row, is_first)
    else:
        n = tl.num_programs(0)
        tl.store(summary + row, maximum)
        tl.store(summary + n + row, sum_relative)
        tl.store(summary + 2 * n + row, label_logit)
        tl.store(summary + 3 * n + row, is_first.to(tl.float32))


@triton.jit
def _gradient_kernel(logits, labels, coefficients, normalizers, stride, vocab: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row).to(tl.int32)
    normalizer, coefficient = tl.load(normalizers + row), tl.load(coefficients + row)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        x = tl.load(logits + column, mask=inside, other=-3e38).to(tl.float32)
        gradient = _d_logits(x, column, label, normalizer, coefficient)
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _d_logits(x, column, label, normalizer, coefficient):
    return (tl.exp(x - normalizer) - tl.where(column == label, 1.0, 0.0)) * coefficient
