"""Norms and rotary embeddings whose backward passes read and write each tensor once."""

import torch
from torch import Tensor

from tidar.kernels.norm import normalize
from tidar.kernels.rotary import rotate, split_heads


class NormWithResidual(torch.autograd.Function):
    """The norm of x, and x for the residual connection: the backward pass adds both gradients in one kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, scale = normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out, x.view_as(x)

    @staticmethod
    def backward(ctx, d_out: Tensor, d_residual: Tensor):
        return *norm_backward(d_out, d_residual, *ctx.saved_tensors), None


class RotatedHeads(torch.autograd.Function):
    """`split_heads`, with queries and keys rotated by their positions."""

    @staticmethod
    def forward(ctx, heads: Tensor, cos: Tensor, sin: Tensor, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = split_heads(heads, n_kv_heads)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    @staticmethod
    def backward(ctx, d_q: Tensor, d_k: Tensor, d_v: Tensor):
        return heads_backward(d_q, d_k, d_v, *ctx.saved_tensors), None, None, None


# Operators, because Inductor would compile them to several kernels


@torch.library.custom_op("tidar::norm_backward", mutates_args=())
def norm_backward(d_out: Tensor, d_residual: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in `normalize`; `d_residual` is added to that of x."""
    if x.is_cuda:
        from tidar.kernels import norm_rotary_triton  # Triton comes with CUDA's torch only

        out, residual, rows = (tensor.contiguous().flatten(0, -2) for tensor in (d_out, d_residual, x))
        d_x, d_weight = norm_rotary_triton.norm_backward(out, residual, rows, weight, scale.flatten())
        return d_x.view_as(x), d_weight
    normal = x.float() * scale
    g = d_out.float() * weight
    d_x = d_residual + scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    d_weight = (d_out.float() * normal.to(x.dtype)).flatten(0, -2).sum(dim=0)
    return d_x.to(x.dtype).contiguous(), d_weight.to(weight.dtype)


@norm_backward.register_fake
def _(d_out: Tensor, d_residual: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@torch.library.custom_op("tidar::heads_backward", mutates_args=())
def heads_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the heads of `RotatedHeads`."""
    if d_q.is_cuda:
        from tidar.kernels import norm_rotary_triton

        return norm_rotary_triton.heads_backward(d_q, d_k, d_v, cos.contiguous(), sin.contiguous())
    # rotated back: the sines of both halves are the same
    parts = [rotate(d_q, cos, -sin), rotate(d_k, cos, -sin), d_v]
    groups = torch.cat([part.unflatten(1, (d_k.shape[1], -1)) for part in parts], dim=2)
    return groups.flatten(1, 2).transpose(1, 2).contiguous()


@heads_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, n_heads, positions, head_dim = d_q.shape
    return d_q.new_empty(batch, positions, n_heads + 2 * d_k.shape[1], head_dim)
