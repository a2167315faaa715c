"""Matmuls by QuACK's GEMM kernels, with bias and residual, and the MLP with its gated activation, in their epilogues.

For Hopper GPUs. As kernels of their own, epilogues would read and write their tensors once more in each direction.
"""

from collections.abc import Callable
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.kernels.selection import ALIGNED, count_sms


class Tile(NamedTuple):
    """How a GEMM is tiled: rows and columns of the result that an SM computes at a time.

    pingpong: two tiles alternate on an SM, so that one is computed while the other is written. cluster: how many tiles,
    by rows and by columns, share the operands that they read.
    """

    rows: int
    columns: int
    pingpong: bool
    cluster: tuple[int, int]


# and their rates on an H200 at its power limit, relative to the best (tidar/benchmarks/matmul.py)
TILES = {
    Tile(128, 192, pingpong=True, cluster=(2, 1)): 0.96,
    Tile(256, 192, pingpong=False, cluster=(1, 2)): 1.0,
    Tile(256, 208, pingpong=False, cluster=(1, 2)): 0.97,
    Tile(128, 256, pingpong=False, cluster=(2, 1)): 0.97,
}
# the activation's epilogues need more registers
GATED_TILE = Tile(128, 160, pingpong=True, cluster=(2, 1))
GATED_BACKWARD_TILE = Tile(128, 128, pingpong=True, cluster=(2, 1))
# below this k the time to write results counts, which pingpong hides
SMALL_K = 4096


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None, dynamic: bool = False) -> Tensor:
    """`residual + (silu(x @ gate.T) * (x @ up.T)) @ down.T`, where `gate, up = gate_up.chunk(2)`.

    x, residual: `[..., dim]`; gate_up: `[2 * hidden, dim]`; down: `[dim, hidden]`. Saves the activation's inputs for
    the backward pass, which recomputes its results. dynamic: see `matmul`.
    """
    rows = None if residual is None else residual.flatten(0, -2)
    return _GatedMLP.apply(x.flatten(0, -2), gate_up, down, rows, dynamic).view_as(x)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, dynamic: bool = False
) -> Tensor:
    """`x @ weight.T`, plus bias and residual. x: `[..., in]`; weight: `[out, in]`; residual: `[..., out]`.

    dynamic: see `matmul`.
    """
    rows = None if residual is None else residual.flatten(0, -2)
    return _Linear.apply(x.flatten(0, -2), weight, bias, rows, dynamic).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dynamic: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.has_residual, ctx.dynamic = bias is not None, residual is not None, dynamic
        return matmul(x, weight.T, residual, bias, dynamic)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, weight = ctx.saved_tensors
        d_bias = d_out.sum(dim=0) if ctx.has_bias else None
        d_x, d_weight = matmul(d_out, weight, None, None, ctx.dynamic), matmul(d_out.T, x, None, None, ctx.dynamic)
        return d_x, d_weight, d_bias, d_out if ctx.has_residual else None, None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor | None, dynamic: bool) -> Tensor:
        preactivation, activation = gated_matmul(x, gate_up, dynamic)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, gate_up, down, preactivation)
        ctx.dynamic = dynamic
        return matmul(activation, down.T, residual, None, dynamic)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate_up, down, preactivation = ctx.saved_tensors
        d_preactivation, activation = gated_matmul_backward(d_out, down, preactivation, ctx.dynamic)
        d_down = matmul(d_out.T, activation, None, None, ctx.dynamic)
        d_x = gated_input_backward(d_preactivation, gate_up, ctx.dynamic)
        d_residual = d_out if ctx.has_residual else None
        return d_x, gate_up_backward(d_preactivation, x, ctx.dynamic), d_down, d_residual, None


# Operators, because torch.compile cannot trace QuACK's kernels. Columns of gate and up are interleaved in the result of
# their matmul, so that one tile has both inputs of an activation. The implementation of each operator also takes the
# number of SMs, None on a CPU, so that `tidar.training.compile_ahead` can call it without a device


@torch.library.custom_op("tidar::matmul", mutates_args=())
def matmul(a: Tensor, b: Tensor, c: Tensor | None = None, bias: Tensor | None = None, dynamic: bool = False) -> Tensor:
    """`a @ b + c + bias`. a: `[m, k]`; b: `[k, n]`; c: `[m, n]`; bias: `[n]`.

    dynamic: an SM takes its next tile when it is free. By default each has its tiles from the start, which is faster
    where no other kernel holds SMs, as those of collectives do.
    """
    return _matmul(count_sms(a.device), a, b, c, bias, dynamic)


def _matmul(
    num_sms: int | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    dynamic: bool = False,
) -> Tensor:
    tile = best_tile(*a.shape, b.shape[1], num_sms)
    matrices = [matrix for matrix in (a, b, c) if matrix is not None]
    if tile is None or b.shape[1] % ALIGNED or not all(map(_is_aligned, matrices)):
        if c is not None and bias is not None:
            c = c + bias
        elif c is None:
            c = bias
        return a @ b if c is None else torch.addmm(c, a, b)
    return quack_matmul(a, b, tile, c, bias, dynamic=dynamic)


@matmul.register_fake
def _(a: Tensor, b: Tensor, c: Tensor | None = None, bias: Tensor | None = None, dynamic: bool = False) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("tidar::gated_matmul", mutates_args=())
def gated_matmul(x: Tensor, gate_up: Tensor, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    """The preactivation, columns of `x @ gate.T` and `x @ up.T` interleaved, `[n, 2 * hidden]`, and the activation,
    `silu(x @ gate.T) * (x @ up.T)`, `[n, hidden]`. x: `[n, dim]`; gate_up: `[2 * hidden, dim]`, gate above up.
    """
    return _gated_matmul(count_sms(x.device), x, gate_up, dynamic)


def _gated_matmul(num_sms: int | None, x: Tensor, gate_up: Tensor, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    if num_sms is None:
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        return torch.stack([gate, up], dim=-1).flatten(1), F.silu(gate) * up
    return quack_gated_matmul(x, gate_up, GATED_TILE, dynamic)


@gated_matmul.register_fake
def _(x: Tensor, gate_up: Tensor, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(gate_up)), x.new_empty(len(x), len(gate_up) // 2)


@torch.library.custom_op("tidar::gated_matmul_backward", mutates_args=())
def gated_matmul_backward(
    d_out: Tensor, down: Tensor, preactivation: Tensor, dynamic: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradient of `preactivation`, and `activation` recomputed, as of `gated_matmul`.

    d_out: the gradient of `activation @ down.T`, `[n, dim]`.
    """
    return _gated_matmul_backward(count_sms(d_out.device), d_out, down, preactivation, dynamic)


def _gated_matmul_backward(
    num_sms: int | None, d_out: Tensor, down: Tensor, preactivation: Tensor, dynamic: bool = False
) -> tuple[Tensor, Tensor]:
    if num_sms is None:
        d_activation = d_out @ down
        gate, up = preactivation.view(len(preactivation), -1, 2).unbind(-1)
        share = gate.sigmoid()
        d_gate = d_activation * up * share * (1 + gate * (1 - share))
        return torch.stack([d_gate, d_activation * gate * share], dim=-1).flatten(1), gate * share * up
    return quack_gated_matmul_backward(d_out, down, preactivation, GATED_BACKWARD_TILE, dynamic)


@gated_matmul_backward.register_fake
def _(d_out: Tensor, down: Tensor, preactivation: Tensor, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    n, both = preactivation.shape
    return torch.empty_like(preactivation), preactivation.new_empty(n, both // 2)


@torch.library.custom_op("tidar::gated_input_backward", mutates_args=())
def gated_input_backward(d_preactivation: Tensor, gate_up: Tensor, dynamic: bool = False) -> Tensor:
    """The gradient of `x`, from that of `preactivation`, as of `gated_matmul`."""
    return _gated_input_backward(count_sms(gate_up.device), d_preactivation, gate_up, dynamic)


def _gated_input_backward(
    num_sms: int | None, d_preactivation: Tensor, gate_up: Tensor, dynamic: bool = False
) -> Tensor:
    if tile := best_tile(*d_preactivation.shape, gate_up.shape[1], num_sms):
        return quack_matmul(d_preactivation, gate_up, tile, concatenated=("B",), dynamic=dynamic)
    return _concatenated(d_preactivation) @ gate_up


@gated_input_backward.register_fake
def _(d_preactivation: Tensor, gate_up: Tensor, dynamic: bool = False) -> Tensor:
    return d_preactivation.new_empty(len(d_preactivation), gate_up.shape[1])


@torch.library.custom_op("tidar::gate_up_backward", mutates_args=())
def gate_up_backward(d_preactivation: Tensor, x: Tensor, dynamic: bool = False) -> Tensor:
    """The gradient of `gate_up`, `[2 * hidden, dim]`, from that of `preactivation`, as of `gated_matmul`."""
    return _gate_up_backward(count_sms(x.device), d_preactivation, x, dynamic)


def _gate_up_backward(num_sms: int | None, d_preactivation: Tensor, x: Tensor, dynamic: bool = False) -> Tensor:
    n, both = d_preactivation.shape
    if tile := best_tile(both, n, x.shape[1], num_sms):
        return quack_matmul(d_preactivation.T, x, tile, concatenated=("out",), dynamic=dynamic)
    return _concatenated(d_preactivation).T @ x


@gate_up_backward.register_fake
def _(d_preactivation: Tensor, x: Tensor, dynamic: bool = False) -> Tensor:
    return x.new_empty(d_preactivation.shape[1], x.shape[1])


# of the operators, by their names
IMPLEMENTATIONS: dict[str, Callable] = {
    "tidar::matmul": _matmul,
    "tidar::gated_matmul": _gated_matmul,
    "tidar::gated_matmul_backward": _gated_matmul_backward,
    "tidar::gated_input_backward": _gated_input_backward,
    "tidar::gate_up_backward": _gate_up_backward,
}


def quack_matmul(
    a: Tensor,
    b: Tensor,
    tile: Tile,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    concatenated: tuple[str, ...] = (),
    dynamic: bool = False,
) -> Tensor:
    """As `matmul`. concatenated: which of "B" and "out" have all rows of gate, then all of up, and not interleaved."""
    from quack.gemm_interface import gemm_tuned

    out = a.new_empty(a.shape[0], b.shape[1])
    options = dict(config=_config(tile), dynamic_scheduler=dynamic, concat_layout=concatenated or None)
    gemm_tuned.fn(a, b, out, c, bias, **options)
    return out


def quack_gated_matmul(x: Tensor, gate_up: Tensor, tile: Tile, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    from quack.gemm_interface import gemm_gated

    options = dict(config=_config(tile), dynamic_scheduler=dynamic, concat_layout=("B",))
    return gemm_gated(x, gate_up.T, activation="swiglu", **options)


def quack_gated_matmul_backward(
    d_out: Tensor, down: Tensor, preactivation: Tensor, tile: Tile, dynamic: bool = False
) -> tuple[Tensor, Tensor]:
    from quack.gemm_interface import gemm_dgated

    options = dict(config=_config(tile), dynamic_scheduler=dynamic)
    return gemm_dgated(d_out, down, preactivation, activation="swiglu", **options)


def _concatenated(interleaved: Tensor) -> Tensor:
    """Interleaved columns of gate and up as all of gate, then all of up: the order of the rows of `gate_up`."""
    return interleaved.unflatten(1, (-1, 2)).mT.flatten(1)


def _is_aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return min(rows, columns) == 1 and max(rows, columns) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


@lru_cache
def best_tile(m: int, k: int, n: int, num_sms: int | None) -> Tile | None:
    """The tile with the least estimated time for `[m, k] @ [k, n]`.

    None means torch's matmul: on a CPU (`num_sms` None), and where there is less than about one tile for each SM,
    because cuBLAS then splits the sums along k.
    """
    if num_sms is None:
        return None
    best, least = None, float("inf")
    for tile, rate in TILES.items():
        waves = ceil(m / tile.rows) * ceil(n / tile.columns) / num_sms
        if waves < 0.9 or not tile.pingpong and k < SMALL_K:
            continue
        # SMs that idle in the last wave leave their power to the others: measured, it costs half a wave
        time = (waves + ceil(waves)) / 2 * tile.rows * tile.columns / rate
        if time < least:
            best, least = tile, time
    return best


def tile_options(tile: Tile) -> dict[str, int | bool]:
    """Named as the arguments of `gemm` of QuACK's epilogues; GemmConfig has the same names in lower case."""
    cluster_m, cluster_n = tile.cluster
    return {
        "tile_M": tile.rows,
        "tile_N": tile.columns,
        "cluster_M": cluster_m,
        "cluster_N": cluster_n,
        "pingpong": tile.pingpong,
    }


@lru_cache
def _config(tile: Tile):
    from quack.gemm_config import GemmConfig

    options = {name.lower(): value for name, value in tile_options(tile).items()}
    return GemmConfig(**options, is_dynamic_persistent=False)
