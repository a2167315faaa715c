"""Attention. The kind of its mask decides which backend runs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tidar.kernels.compiling import compiled

Mask = BlockMask | Tensor | None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, flash: bool = False) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`.

    q: `[batch, n_heads, positions, head_dim]`; k, v: `[batch, n_kv_heads, positions, head_dim]`; returns q's shape.
    mask: a BlockMask runs FlexAttention; a bool tensor `[batch, 1, positions, positions]` runs SDPA; None is causal.
    flash: FlexAttention uses FlashAttention-4's kernels.
    """
    if isinstance(mask, BlockMask):
        # FlexAttention is fused only when compiled
        attend: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return attend(
            q,
            k,
            v,
            block_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options={"BACKEND": "FLASH"} if flash else None,
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
