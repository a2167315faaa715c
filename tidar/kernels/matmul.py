"""The gated MLP with SiLU and the residual inside of its products, and other products, by QuACK's GEMM kernels.

For Hopper GPUs. Outside of the products the activation's inputs and results would pass through memory once more in each
direction.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.kernels.selection import ALIGNED, multiprocessors


class Tile(NamedTuple):
    """How a product is divided: rows and columns of the result that a multiprocessor makes at one time.

    pingpong: two tiles take turns there, so that one is computed while the other is written. cluster: how many tiles,
    by rows and by columns, share what they read.
    """

    rows: int
    columns: int
    pingpong: bool
    cluster: tuple[int, int]


# with the rate of each on an H200 at its power's limit, relative to the best (tidar/benchmarks/matmul.py)
TILES = {
    Tile(128, 192, pingpong=True, cluster=(2, 1)): 0.96,
    Tile(256, 192, pingpong=False, cluster=(1, 2)): 1.0,
    Tile(256, 208, pingpong=False, cluster=(1, 2)): 0.97,
    Tile(128, 256, pingpong=False, cluster=(2, 1)): 0.97,
}
# the epilogues of the activation hold more registers
GATED_TILE = Tile(128, 160, pingpong=True, cluster=(2, 1))
GATED_BACKWARD_TILE = Tile(128, 128, pingpong=True, cluster=(2, 1))
# below this k the time in which results are written counts, which pingpong hides
SMALL_K = 4096


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor) -> Tensor:
    """`residual + (silu(x @ gate.T) * (x @ up.T)) @ down.T`, where `gate, up = gate_up.chunk(2)`.

    x, residual: `[..., dim]`; gate_up: `[2 * hidden, dim]`; down: `[dim, hidden]`. For the backward pass it keeps the
    inputs of the activation, and not its results.
    """
    return _GatedMLP.apply(x.flatten(0, -2), gate_up, down, residual.flatten(0, -2)).view_as(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x @ weight.T`, plus bias and residual. x: `[..., in]`; weight: `[out, in]`; residual: `[..., out]`."""
    rows = None if residual is None else residual.flatten(0, -2)
    return _Linear.apply(x.flatten(0, -2), weight, bias, rows).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        return product(x, weight.T, residual, bias)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, weight = ctx.saved_tensors
        d_bias = d_out.sum(dim=0) if ctx.has_bias else None
        return product(d_out, weight), product(d_out.T, x), d_bias, d_out if ctx.has_residual else None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor) -> Tensor:
        preactivation, activation = gated_product(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, preactivation)
        return product(activation, down.T, residual)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate_up, down, preactivation = ctx.saved_tensors
        d_preactivation, activation = gated_product_backward(d_out, down, preactivation)
        d_down = product(d_out.T, activation)
        d_x = gated_input_backward(d_preactivation, gate_up)
        return d_x, gate_up_backward(d_preactivation, x), d_down, d_out


# Operators, because torch.compile cannot look into QuACK's kernels. Columns of gate and up are interleaved in the
# result of their product: so one tile has all that an element of the activation needs. What is beneath each one
# takes the number of multiprocessors, too, None for a CPU: `tidar.training.compile_ahead` calls it without a device


@torch.library.custom_op("tidar::product", mutates_args=())
def product(a: Tensor, b: Tensor, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`a @ b`, `[m, n]`, of `[m, k]` and `[k, n]`, plus `addend`, `[m, n]`, and `bias`, `[n]`, where they are given."""
    return _product(multiprocessors(a.device), a, b, addend, bias)


def _product(
    count: int | None, a: Tensor, b: Tensor, addend: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    tile = best_tile(*a.shape, b.shape[1], count)
    matrices = [matrix for matrix in (a, b, addend) if matrix is not None]
    if tile is None or b.shape[1] % ALIGNED or not all(map(_is_aligned, matrices)):
        if addend is not None and bias is not None:
            addend = addend + bias
        elif addend is None:
            addend = bias
        return a @ b if addend is None else torch.addmm(addend, a, b)
    return quack_product(a, b, tile, addend, bias)


@product.register_fake
def _(a: Tensor, b: Tensor, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("tidar::gated_product", mutates_args=())
def gated_product(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`x @ gate.T` and `x @ up.T`, interleaved, `[n, 2 * hidden]`; silu of the one times the other, `[n, hidden]`."""
    return _gated_product(multiprocessors(x.device), x, gate_up)


def _gated_product(count: int | None, x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if count is None:
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        return torch.stack([gate, up], dim=-1).flatten(1), F.silu(gate) * up
    return quack_gated_product(x, gate_up, GATED_TILE)


@gated_product.register_fake
def _(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(gate_up)), x.new_empty(len(x), len(gate_up) // 2)


@torch.library.custom_op("tidar::gated_product_backward", mutates_args=())
def gated_product_backward(d_out: Tensor, down: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `activation @ down.T`: that of `preactivation`, and `activation`, as of `gated_product`."""
    return _gated_product_backward(multiprocessors(d_out.device), d_out, down, preactivation)


def _gated_product_backward(
    count: int | None, d_out: Tensor, down: Tensor, preactivation: Tensor
) -> tuple[Tensor, Tensor]:
    if count is None:
        d_activation = d_out @ down
        gate, up = preactivation.view(len(preactivation), -1, 2).unbind(-1)
        share = gate.sigmoid()
        d_gate = d_activation * up * share * (1 + gate * (1 - share))
        return torch.stack([d_gate, d_activation * gate * share], dim=-1).flatten(1), gate * share * up
    return quack_gated_product_backward(d_out, down, preactivation, GATED_BACKWARD_TILE)


@gated_product_backward.register_fake
def _(d_out: Tensor, down: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    n, both = preactivation.shape
    return torch.empty_like(preactivation), preactivation.new_empty(n, both // 2)


@torch.library.custom_op("tidar::gated_input_backward", mutates_args=())
def gated_input_backward(d_preactivation: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `x`, from that of `preactivation`, as of `gated_product`."""
    return _gated_input_backward(multiprocessors(gate_up.device), d_preactivation, gate_up)


def _gated_input_backward(count: int | None, d_preactivation: Tensor, gate_up: Tensor) -> Tensor:
    if tile := best_tile(*d_preactivation.shape, gate_up.shape[1], count):
        return quack_product(d_preactivation, gate_up, tile, concatenated=("B",))
    return _concatenated(d_preactivation) @ gate_up


@gated_input_backward.register_fake
def _(d_preactivation: Tensor, gate_up: Tensor) -> Tensor:
    return d_preactivation.new_empty(len(d_preactivation), gate_up.shape[1])


@torch.library.custom_op("tidar::gate_up_backward", mutates_args=())
def gate_up_backward(d_preactivation: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gate_up`, `[2 * hidden, dim]`, from that of `preactivation`, as of `gated_product`."""
    return _gate_up_backward(multiprocessors(x.device), d_preactivation, x)


def _gate_up_backward(count: int | None, d_preactivation: Tensor, x: Tensor) -> Tensor:
    n, both = d_preactivation.shape
    if tile := best_tile(both, n, x.shape[1], count):
        return quack_product(d_preactivation.T, x, tile, concatenated=("out",))
    return _concatenated(d_preactivation).T @ x


@gate_up_backward.register_fake
def _(d_preactivation: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(d_preactivation.shape[1], x.shape[1])


# what is beneath the operators, by their names
BENEATH = {
    "tidar::product": _product,
    "tidar::gated_product": _gated_product,
    "tidar::gated_product_backward": _gated_product_backward,
    "tidar::gated_input_backward": _gated_input_backward,
    "tidar::gate_up_backward": _gate_up_backward,
}


def quack_product(
    a: Tensor,
    b: Tensor,
    tile: Tile,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    concatenated: tuple[str, ...] = (),
) -> Tensor:
    """As `product`. concatenated: those of "B" and "out" whose rows are all of gate's and then all of up's."""
    from quack.gemm_interface import gemm_tuned

    out = a.new_empty(a.shape[0], b.shape[1])
    gemm_tuned.fn(a, b, out, addend, bias, config=_config(tile), concat_layout=concatenated or None)
    return out


def quack_gated_product(x: Tensor, gate_up: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    from quack.gemm_interface import gemm_gated

    return gemm_gated(x, gate_up.T, activation="swiglu", config=_config(tile), concat_layout=("B",))


def quack_gated_product_backward(
    d_out: Tensor, down: Tensor, preactivation: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    from quack.gemm_interface import gemm_dgated

    config = _config(tile)
    return gemm_dgated(d_out, down, preactivation, activation="swiglu", config=config, dynamic_scheduler=False)


def _concatenated(interleaved: Tensor) -> Tensor:
    """Columns of gate and up, interleaved, as all of gate's and then all of up's: as the rows of `gate_up` lie."""
    return interleaved.unflatten(1, (-1, 2)).mT.flatten(1)


def _is_aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return min(rows, columns) == 1 and max(rows, columns) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


@lru_cache
def best_tile(m: int, k: int, n: int, count: int | None) -> Tile | None:
    """The tile with which `[m, k] @ [k, n]` takes the least time on `count` multiprocessors, by an estimate.

    None is for torch: on a CPU, and where there is less than about one tile for each multiprocessor, for cuBLAS then
    divides the sums along k.
    """
    if count is None:
        return None
    best, least = None, float("inf")
    for tile, rate in TILES.items():
        waves = ceil(m / tile.rows) * ceil(n / tile.columns) / count
        if waves < 0.9 or not tile.pingpong and k < SMALL_K:
            continue
        # multiprocessors that idle in the last wave leave their power to the others: measured, it costs half a wave
        time = (waves + ceil(waves)) / 2 * tile.rows * tile.columns / rate
        if time < least:
            best, least = tile, time
    return best


def tile_options(tile: Tile) -> dict[str, int | bool]:
    """As QuACK's `gemm` of an epilogue names them, and its GemmConfig in small letters."""
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
