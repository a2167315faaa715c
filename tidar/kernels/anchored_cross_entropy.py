"""Cross-entropy of an output projection and its gradients, with exponentials in place of logits, by QuACK's kernels.

For a row with logits z and target y, the GEMM of z writes e_j = exp(z_j - z_y) in place of z_j, and its epilogue sums
them to S. Anchored at the target, no maximum is needed: the cross-entropy is log S, and its gradient is
c (e_j / S - [j = y]), with the row's coefficient c. That is the row's scale c / S times the GEMM's result, once S is
subtracted from the target's element. A scale of rows commutes with a matmul, so no further pass over the vocabulary is
needed. Logits are never rounded to 16 bits; e and the scaled hidden states are. Needs a Hopper GPU and bfloat16, for
the range of e.

Where ranks have parts of the vocabulary, they exchange z_y, which one of them has, before the GEMM, and their sums
after it. The rest is as on one device, with the element of the target on one rank only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import cutlass.cute as cute
import torch
import triton
import triton.language as tl
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.library import identity_epi
from quack.epilogue.math import pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, ColVecSelect
from torch import Tensor

from tidar.kernels.matmul import Tile, best_tile, tile_options
from tidar.kernels.selection import count_sms

# pingpong hides the epilogues
TILE = Tile(128, 192, pingpong=True, cluster=(2, 1))
LOG2E = 1.4426950408889634
# log2 of e at the target, and of the largest e, so that sums are far from the limits of float32's range. In gradients,
# logits more than 111 nats above the target's count as 111, and those 45 nats below it not at all
AT_TARGET, LARGEST = -60.0, 100.0
# targets are padded to a multiple of it, because QuACK caches something for each number of rows
TARGETS = 128

_label = ColVecLoad("label")


class Shard(Protocol):
    """A part of the vocabulary (`tidar.models.TensorShard`)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def total(self, value: Tensor) -> Tensor: ...

    def stacked(self, x: Tensor) -> Tensor: ...


@gemm_epilogue(
    ops={"anchor": ColVecLoad("anchor")},
    reduces={"total": ColVecReduce("total"), "largest": ColVecReduce("largest", combine="max", check_oob=False)},
    outs={"target": ColVecSelect("target", idx_op=_label)},
    extra_ops=(_label,),
)
def exponentials(acc, anchor):
    """Exponentials of logits, sums of them and largest logits by row and tile, and the targets' logits."""
    e = pexp2(cute.arch.fmin(acc * LOG2E - anchor, LARGEST, nan=True))
    return {"D": e, "total": e, "largest": acc, "target": acc}


@gemm_epilogue(ops={"scale": ColVecLoad("scale")})
def scaled_rows(acc, scale):
    return {"D": acc * scale}


def score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    accumulate: bool,
    chunk_size: int,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """nll `[n]` and correct `[n]` of a chunk. Writes the gradients of sum(coefficients * nll) to `d_hidden` and
    `d_weight`; accumulate: adds those of the weight. correct: whether no logit is larger than the target's.

    hidden, d_hidden: `[n, dim]` bfloat16; weight: `[vocab, dim]` bfloat16, vocab a multiple of VOCAB_MULTIPLE; labels:
    `[n]` int64; coefficients: `[n]` float32; d_weight: `[vocab, dim]` float32. chunk_size: the largest n. shard: the
    part of the vocabulary that `weight` is; `d_hidden` is what this part adds to the gradient.
    """
    (n, dim), vocab = hidden.shape, len(weight)
    labels = labels - shard.rank * vocab
    e = hidden.new_empty(n, vocab)
    anchors, targets, scales, nll = coefficients.new_empty(4, -(-n // 4) * 4)[:, :n]  # each of them aligned
    totals, largest = coefficients.new_empty(2, n, -(-vocab // TILE.columns))
    correct = torch.empty_like(labels, dtype=torch.bool)
    scaled_hidden = torch.empty_like(hidden)
    BLOCK = triton.next_power_of_2(dim)
    _cross_entropy_anchor_kernel[(n,)](
        hidden, weight, labels, anchors, hidden.stride(0), dim, vocab, LOG2E, AT_TARGET, BLOCK
    )
    if shard.size > 1:
        anchors = shard.total(anchors)
        targets.zero_()  # the GEMM writes those of this part only
    for columns in _parts(vocab):
        _write_exponentials(columns, hidden, weight, labels, anchors, totals, largest, targets, e)
    if shard.size > 1:
        of_ranks = shard.stacked(torch.stack([totals.sum(dim=1), largest.amax(dim=1), targets]))
        totals, largest = (of_ranks[:, i].T.contiguous() for i in range(2))
        targets = of_ranks[:, 2].sum(dim=0)
    _cross_entropy_row_kernel[(n,)](
        *(totals, largest, anchors, targets, labels, coefficients, hidden, e),
        *(nll, correct, scales, scaled_hidden),
        *(hidden.stride(0), e.stride(0), dim, vocab, totals.shape[1], LOG2E, LARGEST),
        *(BLOCK, triton.next_power_of_2(totals.shape[1])),
    )
    # one kernel for all chunks of steps with several, each of which is larger than half of the largest
    size = chunk_size if 2 * n > chunk_size else n
    _write_d_hidden(size, count_sms(hidden.device), e, weight, scales, d_hidden)  # type: ignore[arg-type]
    if not accumulate:
        d_weight.zero_()  # a kernel that writes would be one more to compile
    _add_d_weight(e, scaled_hidden, d_weight)
    return nll, correct


def kernel_calls(
    chunk_size: int, vocab: int, dim: int, dtype: torch.dtype, num_sms: int
) -> Iterator[Callable[[], None]]:
    """Calls of QuACK's kernels of `score`, one by one, on meta tensors."""
    empty = partial(torch.empty, device="meta")
    e, hidden, weight = (empty(*size, dtype=dtype) for size in ((chunk_size, vocab), (chunk_size, dim), (vocab, dim)))
    rows, labels = empty(chunk_size), empty(chunk_size, dtype=torch.int64)
    tiles = empty(chunk_size, -(-vocab // TILE.columns))
    for columns in _parts(vocab):
        yield partial(_write_exponentials, columns, hidden, weight, labels, rows, tiles, tiles, rows, e)
    yield partial(_write_d_hidden, chunk_size, num_sms, e, weight, rows, hidden)
    yield partial(_add_d_weight, e, hidden, empty(vocab, dim))


def _parts(vocab: int) -> list[slice]:
    """The columns of whole tiles, and the rest: a tile that reaches past the last column would sum other elements."""
    edge = vocab // TILE.columns * TILE.columns
    return [columns for columns in (slice(0, edge), slice(edge, vocab)) if columns.start < columns.stop]


def _write_exponentials(
    columns: slice,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    anchors: Tensor,
    totals: Tensor,
    largest: Tensor,
    targets: Tensor,
    e: Tensor,
) -> None:
    start, end = columns.start, columns.stop
    tile = TILE if end - start >= TILE.columns else TILE._replace(columns=end - start)
    tiles = slice(start // TILE.columns, -(-end // TILE.columns))
    sums = {"total": totals[:, tiles], "largest": largest[:, tiles], "target": targets}
    epi_args = {"anchor": anchors, "label": (labels - start).int()} | sums
    exponentials.gemm(
        hidden, weight[columns], e[:, columns], epi_args=epi_args, max_swizzle_size=16, **tile_options(tile)
    )


def _write_d_hidden(size: int, num_sms: int, e: Tensor, weight: Tensor, scales: Tensor, d_hidden: Tensor) -> None:
    tile = best_tile(size, *weight.shape, num_sms) or TILE
    scaled_rows.gemm(e, weight.mT, d_hidden, epi_args={"scale": scales}, **tile_options(tile))


def _add_d_weight(e: Tensor, scaled_hidden: Tensor, d_weight: Tensor) -> None:
    identity_epi.gemm(e.mT, scaled_hidden.mT, d_weight, epi_args={}, add_to_output=True, **tile_options(TILE))


@triton.jit
def _cross_entropy_anchor_kernel(
    hidden,
    weight,
    labels,
    anchors,
    stride,
    dim: tl.constexpr,
    vocab: tl.constexpr,
    log2e: tl.constexpr,
    AT_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The anchor of a row: subtracted from its logits times log2(e), it makes the target's AT_TARGET.

    0 where the label is not in this part of the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    is_own = (label >= 0) & (label < vocab)
    x = tl.load(hidden + row * stride + lanes, mask=lanes < dim, other=0.0).to(tl.float32)
    w = tl.load(weight + label * dim + lanes, mask=is_own & (lanes < dim), other=0.0).to(tl.float32)
    tl.store(anchors + row, tl.where(is_own, tl.sum(x * w) * log2e - AT_TARGET, 0.0))


@triton.jit
def _cross_entropy_row_kernel(
    totals,
    largest,
    anchors,
    targets,
    labels,
    coefficients,
    hidden,
    e,
    nll,
    correct,
    scales,
    scaled_hidden,
    hidden_stride,
    e_stride,
    dim: tl.constexpr,
    vocab: tl.constexpr,
    tiles: tl.constexpr,
    log2e: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """From a row's sums over tiles or ranks: its cross-entropy, the scale of its gradients, and the target's element of
    e, where that is in this part of the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILES)
    inside = lanes < tiles
    total = tl.sum(tl.load(totals + row * tiles + lanes, mask=inside, other=0.0))
    maximum = tl.max(tl.load(largest + row * tiles + lanes, mask=inside, other=-float("inf")))
    # the GEMM's logit differs from the anchor's in its last bits
    target, anchor = tl.load(targets + row), tl.load(anchors + row)
    at_target = tl.exp2(target * log2e - anchor)
    ratio = tl.log(tl.minimum(total, 1.0) / at_target)
    value = tl.where(total < 1.0, ratio, tl.log(total) - tl.log(at_target))
    # where e was clamped, all but the largest logit is negligible
    tl.store(nll + row, tl.where(maximum * log2e - anchor > LARGEST, maximum - target, value))
    tl.store(correct + row, target >= maximum)
    scale = tl.load(coefficients + row) / total
    tl.store(scales + row, scale)
    label = tl.load(labels + row)
    is_own = (label >= 0) & (label < vocab)
    tl.store(e + row * e_stride + label, (at_target - total).to(e.dtype.element_ty), mask=is_own)
    lanes = tl.arange(0, BLOCK)
    x = tl.load(hidden + row * hidden_stride + lanes, mask=lanes < dim, other=0.0).to(tl.float32)
    tl.store(scaled_hidden + row * dim + lanes, (scale * x).to(scaled_hidden.dtype.element_ty), mask=lanes < dim)
