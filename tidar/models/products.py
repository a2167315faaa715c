"""The gated MLP with SiLU inside of its products, and the loss's products, by QuACK's kernels. For Hopper GPUs.

Outside of the products the gate's results would pass through memory once more in each direction.
"""

from functools import lru_cache
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from tidar.models.kernels import ALIGNED

Cut = tuple[int, int, bool, tuple[int, int]]
# how a product is cut, and its rate relative to the best: rows and columns of a tile, whether two tiles take turns on a
# multiprocessor, and by how many rows and columns of tiles a cluster shares what it reads. Rates are those of an H200
# after a second of work, at its power's limit. Taking turns hides the writing of results, which counts where sums are
# short
CUTS = (
    (128, 192, True, (2, 1), 0.96),
    (256, 192, False, (1, 2), 1.0),
    (256, 208, False, (1, 2), 0.97),
    (128, 256, False, (2, 1), 0.97),
)
SHORT_SUM = 4096


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: Tensor) -> Tensor:
    """`residual + (silu(x @ gate.T) * (x @ up.T)) @ down.T`.

    x, residual: `[..., dim]`; gate, up: `[hidden, dim]`; down: `[dim, hidden]`. For the backward pass it keeps what
    the gate takes, and not what it gives.
    """
    return _GatedMLP.apply(x.flatten(0, -2), gate, up, down, residual.flatten(0, -2)).view_as(x)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: Tensor) -> Tensor:
        before, after = gated_product(x, gate, up)
        ctx.save_for_backward(x, gate, up, down, before)
        return product(after, down.T, residual)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate, up, down, before = ctx.saved_tensors
        d_before, after = gated_product_backward(d_out, down, before)
        d_down = product(d_out.T, after)
        d_x, d_gate_up = gated_inputs_backward(d_before, x, gate, up)
        return d_x, *d_gate_up.chunk(2), d_down, d_out


@torch.library.custom_op("tidar::product", mutates_args=())
def product(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    """`a @ b`, plus `addend` where there is one. `[m, n]`, of `[m, k]`, `[k, n]` and `[m, n]`."""
    cut = _cut(*a.shape, b.shape[1], _multiprocessors(a.device)) if a.is_cuda else None
    if cut is None or b.shape[1] % ALIGNED or not all(map(_is_aligned, (a, b, a if addend is None else addend))):
        return a @ b if addend is None else torch.addmm(addend, a, b)
    return _quack_product(a, b, addend, cut)


@product.register_fake
def _(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _quack_product(a: Tensor, b: Tensor, addend: Tensor | None, cut: Cut, halves: tuple[str, ...] = ()) -> Tensor:
    """halves: of "B" and "out" those whose rows lie as two halves in memory, and count by turns in the product."""
    from quack.gemm_interface import gemm_tuned

    out = a.new_empty(a.shape[0], b.shape[1])
    gemm_tuned.fn(a, b, out, addend, config=_config(*cut), concat_layout=halves or None)
    return out


# What lies by turns comes from one product, a tile of which then has what belongs together


@torch.library.custom_op("tidar::gated_product", mutates_args=())
def gated_product(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`x @ gate.T` and `x @ up.T`, columns by turns, `[n, 2 * hidden]`, and silu of the one times the other
    `[n, hidden]`.
    """
    if not x.is_cuda:
        gate, up = x @ gate.T, x @ up.T
        return torch.stack([gate, up], dim=-1).flatten(1), F.silu(gate) * up
    from quack.gemm_interface import gemm_gated

    config = _config(128, 160, True, (2, 1))
    return gemm_gated(x, _halves(gate, up).T, activation="swiglu", config=config, concat_layout=("B",))


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

    config = _config(128, 128, True, (2, 1))
    return gemm_dgated(d_out, down, before, activation="swiglu", config=config, dynamic_scheduler=False)


@gated_product_backward.register_fake
def _(d_out: Tensor, down: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), before.new_empty(len(before), before.shape[1] // 2)


@torch.library.custom_op("tidar::gated_inputs_backward", mutates_args=())
def gated_inputs_backward(d_before: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x`, and of gate above up `[2 * hidden, dim]`, from that of `gated_product`'s `before`."""
    if not x.is_cuda:
        d_gate, d_up = d_before.view(len(x), -1, 2).unbind(-1)
        return d_gate @ gate + d_up @ up, torch.cat([d_gate.T @ x, d_up.T @ x])
    (n, dim), both = x.shape, d_before.shape[1]
    fallback, multiprocessors = CUTS[0][:-1], _multiprocessors(x.device)
    cuts = [_cut(*sizes, dim, multiprocessors) or fallback for sizes in ((n, both), (both, n))]
    d_x = _quack_product(d_before, _halves(gate, up), None, cuts[0], ("B",))
    return d_x, _quack_product(d_before.T, x, None, cuts[1], ("out",))


@gated_inputs_backward.register_fake
def _(d_before: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), gate.new_empty(2 * len(gate), gate.shape[1])


def _halves(gate: Tensor, up: Tensor) -> Tensor:
    """gate above up, `[2 * hidden, dim]`: in place where they lie so in memory, as `OneDevice` has them."""
    together = gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    if together and up.storage_offset() == gate.storage_offset() + gate.numel():
        return gate.as_strided((2 * len(gate), gate.shape[1]), gate.stride())
    return torch.cat([gate, up])


def _is_aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    return min(rows, columns) == 1 and max(rows, columns) % ALIGNED == 0 and matrix.data_ptr() % 16 == 0


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _cut(m: int, k: int, n: int, multiprocessors: int) -> Cut | None:
    """With which a product takes the least time, by the tiles that each multiprocessor has to do.

    None for too few tiles, which cuBLAS splits along the sums.
    """
    best, least = None, float("inf")
    for rows, columns, by_turns, cluster, rate in CUTS:
        waves = ceil(m / rows) * ceil(n / columns) / multiprocessors
        if waves < 0.9 or not by_turns and k < SHORT_SUM:
            continue
        # those that have nothing to do in the last wave leave their power to the others: it costs about half of theirs
        work = (waves + ceil(waves)) / 2 * rows * columns / rate
        if work < least:
            best, least = (rows, columns, by_turns, cluster), work
    return best


@lru_cache
def _config(rows: int, columns: int, by_turns: bool, cluster: tuple[int, int]):
    from quack.gemm_config import GemmConfig

    cluster_m, cluster_n = cluster
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=by_turns,
        cluster_m=cluster_m,
        cluster_n=cluster_n,
        is_dynamic_persistent=False,
    )
