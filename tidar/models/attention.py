"""Attention and its backends. The mask that a model is given decides which one runs."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tidar.config import UserError
from tidar.patterns import Documents, Pattern

Mask = BlockMask | Tensor | None

# FlexAttention fuses only when compiled, and so does the evaluation of a mask at all pairs. Shapes stay static: a block
# size that becomes symbolic cannot be traced through create_block_mask (torch 2.11)
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
_compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)


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


class MaskBuilder:
    """The mask of each batch as `backend` ("flex" or "sdpa") wants it, to be shared by all layers.

    Built once per batch where rows are packed, and once per shape where every row is one document.
    """

    def __init__(self, pattern: Pattern, backend: str):
        self.pattern = pattern
        self.backend = backend
        self.unpacked: dict[tuple[int, int], Mask] = {}

    def __call__(self, documents: Documents) -> Mask:
        batch, seq_len = documents.index.shape
        if documents.packed:
            return self._build(documents)
        if (batch, seq_len) not in self.unpacked:
            self.unpacked[batch, seq_len] = self._build(documents)
        return self.unpacked[batch, seq_len]

    @torch.no_grad()
    def _build(self, documents: Documents) -> Mask:
        device = documents.index.device
        batch, seq_len = documents.index.shape
        positions = self.pattern.model_positions(seq_len)
        mask_mod = self.pattern.mask_mod(documents)
        if self.backend == "sdpa":
            return create_mask(mask_mod, batch, None, positions, positions, device=device)
        create = _compiled_create_block_mask if device.type == "cuda" else create_block_mask
        return create(mask_mod, batch, None, positions, positions, device=device)
