"""Attention and its backends. The mask that a model is given decides which one runs."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tidar.config import UserError

Mask = BlockMask | Tensor | None

# FlexAttention fuses only when compiled
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`.

    q: `[batch, n_heads, positions, head_dim]`; k, v: `[batch, n_kv_heads, positions, head_dim]`; returns q's shape.
    mask: a BlockMask runs FlexAttention; a bool tensor `[batch, 1, positions, positions]` runs SDPA; None is causal.
    """
    if isinstance(mask, BlockMask):
        return _compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def resolve_backend(backend: str, device: torch.device) -> str:
    """What model.attention_backend means here, "flex" or "sdpa". Raises UserError where the device cannot train so."""
    if backend == "auto":
        return "flex" if device.type == "cuda" else "sdpa"
    if backend == "flex" and device.type != "cuda":
        raise UserError("model.attention_backend = flex: has no backward pass without CUDA; use sdpa or auto")
    return backend
