"""Rounding to FP8 in both layouts, and the MLP's gate with it: Triton kernels, for contiguous matrices on CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows and columns of a program, and its warps: among the fastest on an H200 (docs/performance-log.md)
ROWS, COLUMNS, WARPS = 64, 64, 8


def gated_magnitude(preactivation: Tensor) -> Tensor:
    """Largest magnitude of `silu(gate) * up`, float32 scalar. preactivation: gate and up, `[m, 2h]`."""
    m, h = preactivation.shape[0], preactivation.shape[1] // 2
    bits = torch.zeros(1, dtype=torch.int32, device=preactivation.device)
    _magnitude_kernel[_grid(m, h)](preactivation, bits, m, h, ROWS, COLUMNS, num_warps=WARPS)
    return bits.view(torch.float32)[0]


def gated_rounded(preactivation: Tensor, scale: Tensor) -> Tensor:
    """`silu(gate) * up` times scale in e4m3, `[m, h]`."""
    m, h = preactivation.shape[0], preactivation.shape[1] // 2
    result = preactivation.new_empty(m, h, dtype=torch.float8_e4m3fn)
    _gated_kernel[_grid(m, h)](preactivation, scale, result, m, h, ROWS, COLUMNS, num_warps=WARPS)
    return result


def gated_backward(
    d_hidden: Tensor, preactivation: Tensor, scale: Tensor, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tidar.kernels.float8`. padded: columns of the transposed result, m or more."""
    m, h = d_hidden.shape
    d_preactivation = torch.empty_like(preactivation)
    hidden = preactivation.new_empty(h, padded, dtype=torch.float8_e4m3fn)
    bits = torch.zeros(1, dtype=torch.int32, device=preactivation.device)
    _gated_backward_kernel[_grid(padded, h)](
        d_hidden, preactivation, scale, d_preactivation, hidden, bits, m, padded, h, ROWS, COLUMNS, num_warps=WARPS
    )
    return d_preactivation, hidden, bits.view(torch.float32)[0]


def rounded_layouts(
    matrix: Tensor, scale: Tensor, dtype: torch.dtype, padded: int, both: bool
) -> tuple[Tensor, Tensor]:
    """`[m, n]` times scale in FP8, and transposed, followed by zeros, `[n, padded]`.

    both: otherwise the first one is empty.
    """
    m, n = matrix.shape
    plain = matrix.new_empty(m if both else 0, n, dtype=dtype)
    transposed = matrix.new_empty(n, padded, dtype=dtype)
    _layouts_kernel[_grid(padded, n)](
        matrix, scale, plain, transposed, m, padded, n, both, ROWS, COLUMNS, num_warps=WARPS
    )
    return plain, transposed


def _grid(m: int, n: int) -> tuple[int, int]:
    return triton.cdiv(n, COLUMNS), triton.cdiv(m, ROWS)


@triton.jit
def _indices(rows: tl.constexpr, columns: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    return row[:, None], column[None, :]


@triton.jit
def _float8(x, scale, dtype: tl.constexpr):
    largest: tl.constexpr = 57344.0 if dtype == tl.float8e5 else 448.0
    x *= scale
    # values that are not numbers stay so
    return tl.where(x > largest, largest, tl.where(x < -largest, -largest, x)).to(dtype)


@triton.jit
def _raise(bits, x):
    """Maximum of magnitudes as integers, which for floats from 0 on have the same order; NaN is above infinity."""
    magnitudes = tl.abs(x).to(tl.int32, bitcast=True)
    tl.atomic_max(bits, tl.max(magnitudes), sem="relaxed")


@triton.jit
def _load_gate(preactivation, row, column, m, h):
    """Gate and up as float32; zeros outside."""
    inside = (row < m) & (column < h)
    at = preactivation + row * (2 * h) + column
    return tl.load(at, inside, other=0.0).to(tl.float32), tl.load(at + h, inside, other=0.0).to(tl.float32)


@triton.jit
def _magnitude_kernel(preactivation, bits, m, h, rows: tl.constexpr, columns: tl.constexpr):
    row, column = _indices(rows, columns)
    gate, up = _load_gate(preactivation, row, column, m, h)
    _raise(bits, gate * tl.sigmoid(gate) * up)


@triton.jit
def _gated_kernel(preactivation, scale, result, m, h, rows: tl.constexpr, columns: tl.constexpr):
    row, column = _indices(rows, columns)
    gate, up = _load_gate(preactivation, row, column, m, h)
    hidden = _float8(gate * tl.sigmoid(gate) * up, tl.load(scale), tl.float8e4nv)
    tl.store(result + row * h + column, hidden, (row < m) & (column < h))


@triton.jit
def _gated_backward_kernel(
    d_hidden, preactivation, scale, d_preactivation, transposed, bits, m, padded, h,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row, column = _indices(rows, columns)
    inside = (row < m) & (column < h)
    gate, up = _load_gate(preactivation, row, column, m, h)
    gradient = tl.load(d_hidden + row * h + column, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
    d_up = gradient * silu
    dtype = d_preactivation.dtype.element_ty
    d_gate, d_up = d_gate.to(dtype), d_up.to(dtype)
    at = d_preactivation + row * (2 * h) + column
    tl.store(at, d_gate, inside)
    tl.store(at + h, d_up, inside)
    _raise(bits, d_gate.to(tl.float32))
    _raise(bits, d_up.to(tl.float32))
    hidden = _float8(silu * up, tl.load(scale), tl.float8e4nv)
    _store_transposed(transposed, hidden, row, column, padded, h)


@triton.jit
def _layouts_kernel(
    matrix, scale, plain, transposed, m, padded, n, both: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    row, column = _indices(rows, columns)
    inside = (row < m) & (column < n)
    offset = row * n + column
    wide = tl.load(matrix + offset, inside, other=0.0).to(tl.float32)
    narrow = _float8(wide, tl.load(scale), transposed.dtype.element_ty)
    if both:
        tl.store(plain + offset, narrow, inside)
    _store_transposed(transposed, narrow, row, column, padded, n)


@triton.jit
def _store_transposed(transposed, narrow, row, column, padded, n):
    """Rows from m on were loaded as zeros, which fill the columns up to `padded`."""
    at = transposed + tl.trans(column.to(tl.int64) * padded + row)
    tl.store(at, tl.trans(narrow), tl.trans((row < padded) & (column < n)))
