"""Both losses from hidden states, without materializing the logits of all positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.kernels.compiling import compiled
from tidar.kernels.selection import PLAIN, Kernels
from tidar.models.shards import WHOLE, TensorShard
from tidar.patterns import Targets


@dataclass
class TokenScores:
    """Scores of the `n` target tokens of one loss: cross-entropy in nats, and whether the arg-max is correct."""

    nll: Tensor
    correct: Tensor


class Objective:
    """L = (sum over losses of w * weighted sum of nll / denominator) / (sum of w), as the head of the decoder.

    The denominator of a loss is the sum of its target weights over the whole optimizer step, on all ranks and in all
    micro-batches. So the losses and gradients of the micro-batches add up to those of the step, however it is split.
    """

    def __init__(
        self,
        loss_weights: dict[str, float],
        chunk_size: int,
        kernels: Kernels = PLAIN,
        shard: TensorShard = WHOLE,
    ):
        """chunk_size: target positions whose logits exist at a time. shard: this rank's part of the vocabulary."""
        self.shard = shard
        self.loss_weights = loss_weights
        self.chunk_size = chunk_size
        self.kernels = kernels
        multiply = torch.matmul
        if kernels.loss_matmul:
            from tidar.kernels.matmul import matmul as multiply
        score_logits: Callable = _fused_score_logits if kernels.loss_kernel else _score_logits
        if shard.size > 1:
            score_logits = partial(_score_part_of_logits, shard=shard, fused=kernels.loss_kernel)
        self.by_logits = partial(_score, multiply=multiply, score_logits=score_logits)

    def __call__(
        self, hidden: Tensor, output_weight: Tensor, targets: dict[str, Targets], denominators: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, TokenScores]]:
        """This micro-batch's share of L, and the scores of its target tokens by loss.

        hidden: `[batch, positions, dim]`; output_weight: `[vocab, dim]`, or this rank's rows of it; denominators:
        scalars. Ranks with parts of the vocabulary have the same share and scores, and gradients of their own logits.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total_weight = sum(self.loss_weights.values())
        shares = []
        for loss, target in targets.items():
            # a step without any target has loss 0, not 0 / 0
            denominator = denominators[loss].to(dtype).clamp_min(torch.finfo(dtype).tiny)
            shares.append(target.weights.to(dtype) * (self.loss_weights[loss] / total_weight) / denominator)
        index = torch.cat([target.index for target in targets.values()])
        with_gradient = torch.is_grad_enabled()
        labels, coefficients = torch.cat([target.labels for target in targets.values()]), torch.cat(shares)
        score, padding = self.by_logits, 0
        if with_gradient and self.kernels.loss_without_logits:
            from tidar.kernels import anchored_cross_entropy  # needs QuACK

            score = partial(anchored_cross_entropy.score, chunk_size=self.chunk_size, shard=self.shard)
            padding = -len(labels) % anchored_cross_entropy.TARGETS
        value, nll, correct = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1).index_select(0, F.pad(index, (0, padding))),
            output_weight,
            F.pad(labels, (0, padding)),
            F.pad(coefficients, (0, padding)),  # zeros
            self.chunk_size,
            score,
            self.kernels.loss_kernel,
            with_gradient,
        )
        sizes = [len(target.labels) for target in targets.values()]
        parts = zip(nll.split([*sizes, padding]), correct.split([*sizes, padding]))
        return value, {loss: TokenScores(*part) for loss, part in zip(targets, parts)}


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum(coefficients * cross-entropy). The forward pass computes the gradient too, from each chunk's logits."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # [n, dim]
        weight: Tensor,  # [vocab, dim]
        labels: Tensor,  # [n]
        coefficients: Tensor,  # [n], at least float32
        chunk_size: int,
        score: Callable,
        fused: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # gradients are computed with coefficients of at most 1, so that they do not underflow in 16 bits
        smallest = coefficients.new_full((1,), torch.finfo(coefficients.dtype).tiny)
        scale = torch.cat([coefficients.abs(), smallest]).amax()
        scaled = coefficients / scale
        nll = torch.empty_like(coefficients)
        correct = torch.empty_like(labels, dtype=torch.bool)
        d_hidden: Any = None
        d_weight: Any = None
        if with_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.empty_like(weight, dtype=coefficients.dtype)
        n_chunks = -(-len(labels) // chunk_size)
        for number in range(n_chunks):
            chunk = slice(len(labels) * number // n_chunks, len(labels) * (number + 1) // n_chunks)
            d_chunk = d_hidden[chunk] if with_gradient else None
            nll[chunk], correct[chunk] = score(
                hidden[chunk], weight, labels[chunk], scaled[chunk], d_chunk, d_weight, accumulate=number > 0
            )
        if with_gradient:
            if n_chunks == 0:
                d_weight.zero_()
            ctx.save_for_backward(d_hidden, d_weight, scale)
            ctx.weight_dtype, ctx.fused = weight.dtype, fused
        ctx.mark_non_differentiable(nll, correct)
        return (coefficients * nll).sum(), nll, correct

    @staticmethod
    def backward(ctx, d_value: Tensor, *_):
        d_hidden, d_weight, scale = ctx.saved_tensors
        scale = d_value * scale
        # scaled and rounded in one pass
        if ctx.fused:
            narrow = compiled(_scaled)(d_weight, scale, ctx.weight_dtype)
        else:
            narrow = torch.mul(d_weight, scale, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return d_hidden * scale, narrow, *[None] * 6


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * scale).to(dtype)


def _score(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    d_hidden: Any,  # `[n, dim]`
    d_weight: Any,  # `[vocab, dim]`
    accumulate: bool,
    multiply: Callable[[Tensor, Tensor], Tensor],
    score_logits: Callable,
) -> tuple[Tensor, Tensor]:
    """nll `[n]` and correct `[n]` of a chunk. Writes the gradients of sum(coefficients * nll) to `d_hidden` and
    `d_weight`, unless both are None. accumulate: adds those of the weight. score_logits: as `_score_logits`.
    """
    with_gradient = d_hidden is not None
    d_logits: Any
    nll, correct, d_logits = score_logits(multiply(hidden, weight.T), labels, coefficients, with_gradient)
    if with_gradient:
        d_hidden.copy_(multiply(d_logits, weight))
        _matmul_into(d_weight, d_logits.T, hidden, accumulate)
    return nll, correct


def _matmul_into(total: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """total = a @ b, or += if `accumulate`, summed in the dtype of `total`, which is that of the matrices or wider."""
    if total.is_cuda and total.dtype == torch.float32 != a.dtype:
        if accumulate:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
    elif accumulate:
        total += a @ b
    else:
        total.copy_(a @ b)


def _score_logits(
    logits: Tensor, labels: Tensor, coefficients: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll `[n]`, correct `[n]`, and d sum(coefficients * nll) / d logits `[n, vocab]` in the logits' dtype."""
    wide = logits.to(coefficients.dtype)
    normalizer = wide.logsumexp(dim=-1)
    nll = normalizer - wide.gather(1, labels[:, None])[:, 0]
    correct = wide.argmax(dim=-1) == labels
    return nll, correct, _d_logits(logits, labels, coefficients, normalizer) if with_gradient else None


def _d_logits(logits: Tensor, labels: Tensor, coefficients: Tensor, normalizer: Tensor) -> Tensor:
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    d_logits = (logits.to(coefficients.dtype) - normalizer[:, None]).exp() - is_label.to(coefficients.dtype)
    return (d_logits * coefficients[:, None]).to(logits.dtype)


def _fused_score_logits(logits: Tensor, labels: Tensor, coefficients: Tensor, with_gradient: bool):
    from tidar.kernels.cross_entropy import cross_entropy_  # Triton comes with CUDA's torch only

    return cross_entropy_(logits, labels, coefficients, with_gradient)


def _score_part_of_logits(
    logits: Tensor, labels: Tensor, coefficients: Tensor, with_gradient: bool, shard: TensorShard, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `_score_logits`, where each rank has the logits of its part of the vocabulary. fused: by Triton kernels."""
    summarize, differentiate = _summary, _d_logits
    if fused:
        from tidar.kernels import cross_entropy

        summarize, differentiate = cross_entropy.summary, cross_entropy.d_logits_
    own_labels = labels - shard.rank * logits.shape[1]
    nll, correct, normalizer = _combined(shard.stacked(summarize(logits, own_labels, coefficients.dtype)))
    return nll, correct, differentiate(logits, own_labels, coefficients, normalizer) if with_gradient else None


def _summary(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """What ranks need of each other's logits, `[4, n]`: largest logit, sum of the exponentials relative to it, the
    label's logit, or 0 where it is another rank's, and whether the label's is the largest.
    """
    wide = logits.to(dtype)
    largest, index = wide.max(dim=-1)
    total = (wide - largest[:, None]).exp().sum(dim=-1)
    is_own = (labels >= 0) & (labels < logits.shape[1])
    label_logit = wide.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.stack([largest, total, label_logit.where(is_own, 0), (index == labels).to(dtype)])


def _combined(of_ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, correct and the normalizer of rows, all `[n]`. of_ranks: their summaries, `[ranks, 4, n]`."""
    largest, total, label_logit, correct = of_ranks.unbind(dim=1)
    maximum, rank = largest.max(dim=0)  # the first of equal ones, as within a rank
    normalizer = maximum + (total * (largest - maximum).exp()).sum(dim=0).log()
    return normalizer - label_logit.sum(dim=0), correct.gather(0, rank[None])[0] > 0, normalizer
