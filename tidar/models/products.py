"""The gated MLP with SiLU inside of its products, and the loss's products, by QuACK's kernels. For Hopper GPUs.

Outside of the products the gate's results would pass through memory once more in each direction.
"""

from functools import lru_cache
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.models.kernels import ALIGNED

# rows and columns of a tile, whether two tiles take turns on a multiprocessor, and the share of the best rate that it
# reached on an H200. Taking turns hides the writing of results, which counts where the sums are short
TILES = ((128, 192, True, 0.96), (256, 192, False, 1.0), (256, 208, False, 1.0), (128, 256, False, 0.98))
SHORT_SUM = 4096


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T`.

    x: `[..., dim]`; gate, up: `[hidden, dim]`; down: `[dim, hidden]`. For the backward pass it keeps what the gate
    takes, and not what it gives.
    """
    return _GatedMLP.apply(x.flatten(0, -2), gate, up, down).view_as(x)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        before, after = gated_product(x, gate, up)
        ctx.save_for_backward(x, gate, up, down, before)
        return product(after, down.T)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate, up, down, before = ctx.saved_tensors
        d_before, after = gated_product_backward(d_out, down, before)
        d_down = product(d_out.T, after)
        d_x, d_gate, d_up = gated_inputs_backward(d_before, x, gate, up)
        return d_x, d_gate, d_up, d_down


@torch.library.custom_op("tidar::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` `[m, n]`, of `[m, k]` and `[k, n]`."""
    tile = _tile(*a.shape, b.shape[1], _multiprocessors(a.device)) if a.is_cuda else None
    if tile is None or b.shape[1] % ALIGNED or not (_is_aligned(a) and _is_aligned(b)):
        return a @ b
    from quack.gemm_interface import gemm_tuned

    out = a.new_empty(a.shape[0], b.shape[1])
    gemm_tuned.fn(a, b, out, config=_config(*tile))
    return out


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# Operators by themselves, in part so that the rows of gate and up by turns are not kept from one pass to the other


@torch.library.custom_op("tidar::gated_product", mutates_args=())
def gated_product(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`x @ gate.T` and `x @ up.T`, columns by turns, `[n, 2 * hidden]`, and silu of the one times the other
    `[n, hidden]`.
    """
    weight = _by_turns(gate, up)
    if not x.is_cuda:
        before = x @ weight.T
        gate, up = before.view(len(x), -1, 2).unbind(-1)
        return before, F.silu(gate) * up
    from quack.gemm_interface import gemm_gated

    return gemm_gated(x, weight.T, activation="swiglu", config=_config(128, 160, True))


@gated_product.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), 2 * len(gate)), x.new_empty(len(x), len(gate))


@torch.library.custom_op("tidar::gated_product_backward", mutates_args=())
def gated_product_backward(d_out: Tensor, down: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `after @ down.T`: that of `before`, and `after` again; both as of `gated_product`."""
    if not d_out.is_cuda:
        d_after = d_out @ down
        gate, up = before.view(len(before), -1, 2).unbind(-1)
        share = gate.sigmoid()
        d_gate = d_after * up * share * (1 + gate * (1 - share))
        return torch.stack([d_gate, d_after * gate * share], dim=-1).flatten(1), gate * share * up
    from quack.gemm_interface import gemm_dgated

    config = _config(128, 128, True)
    return gemm_dgated(d_out, down, before, activation="swiglu", config=config, dynamic_scheduler=False)


@gated_product_backward.register_fake
def _(d_out: Tensor, down: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), before.new_empty(len(before), before.shape[1] // 2)


@torch.library.custom_op("tidar::gated_inputs_backward", mutates_args=())
def gated_inputs_backward(d_before: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gated_product`'s inputs, from that of `before`."""
    d_x = product(d_before, _by_turns(gate, up))
    d_gate, d_up = product(d_before.T, x).view(-1, 2, x.shape[1]).unbind(1)
    return d_x, d_gate.contiguous(), d_up.contiguous()


@gated_inputs_backward.register_fake
def _(d_before: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(up)


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both, `[2 * hidden, dim]`: so that one tile of the product has what belongs together."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def _is_aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return min(rows, columns) == 1 and max(rows, columns) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _tile(m: int, k: int, n: int, multiprocessors: int) -> tuple[int, int, bool] | None:
    """The tile with which a product takes the least time, by the tiles that each multiprocessor has to do.

    None for less than one and a half tiles for each, which cuBLAS splits along the sums.
    """
    best, least = None, float("inf")
    for rows, columns, by_turns, rate in TILES:
        waves = ceil(m / rows) * ceil(n / columns) / multiprocessors
        if waves < 1.5 or not by_turns and (k < SHORT_SUM or waves < 2):
            continue
        work = ceil(waves) * rows * columns / rate
        if work < least:
            best, least = (rows, columns, by_turns), work
    return best


@lru_cache
def _config(rows: int, columns: int, by_turns: bool):
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=rows, tile_n=columns, pingpong=by_turns, cluster_m=2, cluster_n=1, is_dynamic_persistent=False
    )
