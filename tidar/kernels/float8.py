"""The gated MLP with its matmuls in FP8, with dynamic tensorwise scaling (arXiv 2209.05433).

Activations and weights become e4m3, gradients e5m2, each scaled by the largest magnitude of the whole matrix: that of
all positions of a micro-batch, and that of gate and up together, which share a weight. On other devices than CUDA
operands are rounded so, but multiplied in float32. On CUDA dim and hidden must be multiples of FLOAT8_MULTIPLE, which
`choose_kernels` checks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.kernels.selection import FLOAT8_MULTIPLE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # magnitude of a matrix, so that one of zeros has a scale


def float8_mlp(x: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None) -> Tensor:
    """`residual + (silu(x @ gate.T) * (x @ up.T)) @ down.T`, where `gate, up = gate_up.chunk(2)`.

    x, residual: `[..., dim]`, one position or more; gate_up: `[2 * hidden, dim]`; down: `[dim, hidden]`; all of one
    dtype, which the result has. Saves the activation's inputs for the backward pass, which recomputes its results.
    """
    out = _Float8MLP.apply(x.flatten(0, -2).contiguous(), gate_up, down).view_as(x)
    return out if residual is None else residual + out


class _Float8MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        scales = [_scale(matrix.abs().amax(), E4M3) for matrix in (x, gate_up, down)]
        x_scale, gate_up_scale, down_scale = scales
        narrow, weight = _rounded(x, x_scale, E4M3), _rounded(gate_up, gate_up_scale, E4M3)
        preactivation = _matmul(narrow, weight.t(), x_scale, gate_up_scale, x.dtype, fast=True)
        hidden_scale = _scale(gated_magnitude(preactivation), E4M3)
        ctx.save_for_backward(x, gate_up, down, preactivation, *scales, hidden_scale)
        hidden, weight = gated_rounded(preactivation, hidden_scale), _rounded(down, down_scale, E4M3)
        return _matmul(hidden, weight.t(), hidden_scale, down_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate_up, down, preactivation, x_scale, gate_up_scale, down_scale, hidden_scale = ctx.saved_tensors
        dtype = x.dtype
        d_out_scale = _scale(d_out.abs().amax(), E5M2)
        narrow, transposed = rounded_layouts(d_out.contiguous(), d_out_scale)
        d_hidden = _matmul(narrow, transposed_rounded(down, down_scale).t(), d_out_scale, down_scale, dtype)
        d_preactivation, hidden, magnitude = gated_float8_backward(d_hidden, preactivation, hidden_scale)
        d_down = _matmul(transposed, hidden.t(), d_out_scale, hidden_scale, dtype)

        d_scale = _scale(magnitude, E5M2)
        narrow, transposed = rounded_layouts(d_preactivation, d_scale)
        d_x = _matmul(narrow, transposed_rounded(gate_up, gate_up_scale).t(), d_scale, gate_up_scale, dtype)
        d_gate_up = _matmul(transposed, transposed_rounded(x, x_scale).t(), d_scale, x_scale, dtype)
        return d_x, d_gate_up, d_down


def _scale(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Factor of a matrix whose largest magnitude then is the largest number of the type; float32 scalar."""
    return torch.finfo(dtype).max / magnitude.float().clamp(min=SMALLEST)


def _rounded(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (matrix.float() * scale).clamp(-largest, largest).to(dtype)


def _matmul(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """`a @ b` of scaled matrices. a: `[m, k]`, by rows; b: `[k, n]`, by columns.

    fast: sums with fewer bits than float32 (`use_fast_accum`), which is accurate enough forward.
    """
    if not a.is_cuda:
        return ((a.float() / a_scale) @ (b.float() / b_scale)).to(dtype)
    inverse = a_scale.reciprocal(), b_scale.reciprocal()
    return torch._scaled_mm(a, b, *inverse, out_dtype=dtype, use_fast_accum=fast)


# Operators of their own, because the kernels that Inductor makes of this take twice as long. Tensors are contiguous.


@torch.library.custom_op("tidar::gated_magnitude", mutates_args=())
def gated_magnitude(preactivation: Tensor) -> Tensor:
    """Largest magnitude of the activation, float32 scalar. preactivation: gate and up, `[m, 2 * hidden]`."""
    if preactivation.is_cuda:
        return _triton().gated_magnitude(preactivation)
    return _gated(preactivation).abs().amax()


@gated_magnitude.register_fake
def _(preactivation: Tensor) -> Tensor:
    return preactivation.new_empty((), dtype=torch.float32)


@torch.library.custom_op("tidar::gated_rounded", mutates_args=())
def gated_rounded(preactivation: Tensor, scale: Tensor) -> Tensor:
    """The activation times scale in e4m3, `[m, hidden]`."""
    if preactivation.is_cuda:
        return _triton().gated_rounded(preactivation, scale)
    return _rounded(_gated(preactivation), scale, E4M3)


@gated_rounded.register_fake
def _(preactivation: Tensor, scale: Tensor) -> Tensor:
    m, n = preactivation.shape
    return preactivation.new_empty(m, n // 2, dtype=E4M3)


@torch.library.custom_op("tidar::gated_float8_backward", mutates_args=())
def gated_float8_backward(d_hidden: Tensor, preactivation: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the activation's inputs, `[m, 2 * hidden]`, from that of its results, `[m, hidden]`.

    Returns also the activation times scale in e4m3, transposed as `transposed_rounded` has it, and the gradient's
    largest magnitude.
    """
    if d_hidden.is_cuda:
        return _triton().gated_backward(d_hidden, preactivation, scale, _multiple(len(d_hidden)))
    gate, up = preactivation.float().chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(d_hidden.float() * up, gate)
    d_preactivation = torch.cat([d_gate, d_hidden.float() * F.silu(gate)], dim=-1).to(preactivation.dtype)
    hidden = _transposed(_rounded(_gated(preactivation), scale, E4M3))
    return d_preactivation, hidden, d_preactivation.float().abs().amax()


@gated_float8_backward.register_fake
def _(d_hidden: Tensor, preactivation: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, hidden = d_hidden.shape
    transposed = d_hidden.new_empty(hidden, _multiple(m), dtype=E4M3)
    return torch.empty_like(preactivation), transposed, d_hidden.new_empty((), dtype=torch.float32)


@torch.library.custom_op("tidar::rounded_layouts", mutates_args=())
def rounded_layouts(gradient: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient `[m, n]` times scale in e5m2, and the same transposed as `transposed_rounded` has it."""
    if gradient.is_cuda:
        return _triton().rounded_layouts(gradient, scale, E5M2, _multiple(len(gradient)), both=True)
    narrow = _rounded(gradient, scale, E5M2)
    return narrow, _transposed(narrow)


@rounded_layouts.register_fake
def _(gradient: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    m, n = gradient.shape
    return gradient.new_empty(m, n, dtype=E5M2), gradient.new_empty(n, _multiple(m), dtype=E5M2)


@torch.library.custom_op("tidar::transposed_rounded", mutates_args=())
def transposed_rounded(matrix: Tensor, scale: Tensor) -> Tensor:
    """A matrix `[m, n]` times scale in e4m3, transposed and followed by zeros: `[n, m rounded up to 16]`."""
    if matrix.is_cuda:
        return _triton().rounded_layouts(matrix, scale, E4M3, _multiple(len(matrix)), both=False)[1]
    return _transposed(_rounded(matrix, scale, E4M3))


@transposed_rounded.register_fake
def _(matrix: Tensor, scale: Tensor) -> Tensor:
    m, n = matrix.shape
    return matrix.new_empty(n, _multiple(m), dtype=E4M3)


def _triton():
    """Imported where it is used, because Triton is not on every machine."""
    from tidar.kernels import float8_triton

    return float8_triton


def _gated(preactivation: Tensor) -> Tensor:
    gate, up = preactivation.float().chunk(2, dim=-1)
    return F.silu(gate) * up


def _multiple(n: int) -> int:
    """The next multiple of FLOAT8_MULTIPLE: over how many a GEMM sums."""
    return -(-n // FLOAT8_MULTIPLE) * FLOAT8_MULTIPLE


def _transposed(matrix: Tensor) -> Tensor:
    """`[n, m rounded up to 16]`, the last columns zeros."""
    m, n = matrix.shape
    result = matrix.new_zeros(n, _multiple(m))
    result[:, :m] = matrix.t()
    return result
