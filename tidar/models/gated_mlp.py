"""The gated MLP with SiLU and its gradient inside the products beside them, by QuACK's kernels. Needs a Hopper GPU.

Else the gate's results pass through memory once more in each direction: 17 of the 340 ms of a 1.5B step on an H200.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

# sizes that whole vectors of 16 bytes divide, also of the columns that are halved
MULTIPLE = 16


def can_fuse_mlp(device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int) -> bool:
    """Whether `gated_mlp` runs here."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and dtype in (torch.bfloat16, torch.float16)
        and dim % MULTIPLE == 0 == hidden_dim % MULTIPLE
        and find_spec("quack") is not None
    )


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T`.

    x: `[..., dim]`; gate, up: `[hidden, dim]`; down: `[dim, hidden]`. For the backward pass it
    keeps what the gate takes, and not what it gives.
    """
    return _GatedMLP.apply(x.flatten(0, -2), gate, up, down).view_as(x)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        before, after = gated_product(x, _interleaved(gate, up))
        ctx.save_for_backward(x, gate, up, down, before)
        return after @ down.T

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, gate, up, down, before = ctx.saved_tensors
        d_before, after = gated_product_backward(d_out, down, before)
        d_x = d_before @ _interleaved(gate, up)
        d_gate, d_up = (d_before.T @ x).view(-1, 2, x.shape[1]).unbind(1)
        return d_x, d_gate.contiguous(), d_up.contiguous(), d_out.T @ after


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both by turns, `[2 * hidden, dim]`: so that a tile of the product has what belongs together."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


@torch.library.custom_op("tidar::gated_product", mutates_args=())
def gated_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`x @ weight.T` `[n, 2 * hidden]`, columns of gate and up by turns, and silu(gate) * up of it `[n, hidden]`."""
    if not x.is_cuda:
        before = x @ weight.T
        gate, up = before.view(len(x), -1, 2).unbind(-1)
        return before, torch.nn.functional.silu(gate) * up
    from quack.gemm_interface import gemm_gated

    return gemm_gated(x, weight.T, activation="swiglu", config=_config())


@gated_product.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight) // 2)


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

    return gemm_dgated(d_out, down, before, activation="swiglu", config=_config(), dynamic_scheduler=False)


@gated_product_backward.register_fake
def _(d_out: Tensor, down: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), before.new_empty(len(before), before.shape[1] // 2)


def _config():
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_m=128, tile_n=160, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
