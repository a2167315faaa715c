"""Attention. The kind of its mask decides which backend runs."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tidar.kernels.compiling import compiled
from tidar.kernels.norm import RMSNorm

Mask = BlockMask | Tensor | None


class KeySource(Protocol):
    """Replaces a layer's mask where queries attend to other keys and values than those of their own positions.

    mask: over the queries and these keys.
    """

    @property
    def mask(self) -> "Mask": ...

    def attended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, given those of the positions; `[batch, n_kv_heads, keys, head_dim]`."""
        ...


class StepAttention(NamedTuple):
    """Replaces the mask of one layer in a decoding step: queries attend to the whole cache.

    keys, values: the cache, `[batch, n_kv_heads, slots, head_dim]`, written in place. slots: where to store the key and
    value of each query, `[batch, positions]` int64. mask: over queries and slots.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    mask: Tensor

    def attended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores `[batch, n_kv_heads, positions, head_dim]`, and returns the keys and values to attend to."""
        index = self.slots[:, None, :, None].expand_as(k)
        return self.keys.scatter_(2, index, k), self.values.scatter_(2, index, v)


class FusedStepAttention(NamedTuple):
    """StepAttention in fused kernels: takes the projected heads, returns the input of the output projection.

    Each query sees the slots `[0, end)` and `[own_start, own_end)`, all `[batch, queries]` int32.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    end: Tensor
    own_start: Tensor
    own_end: Tensor

    def attend(self, heads: Tensor, norms: tuple[nn.Module, nn.Module], cos: Tensor, sin: Tensor) -> Tensor:
        """`[batch, positions, n_heads * head_dim]` from `[batch, positions, all heads, head_dim]`, see `split_heads`.

        norms: of queries and keys, RMSNorm or Identity.
        """
        from tidar.kernels.decode_attention import decode_attention  # Triton comes with CUDA's torch only

        weights = [norm.weight if isinstance(norm, RMSNorm) else None for norm in norms]
        eps = norms[0].eps if isinstance(norms[0], RMSNorm) else 0.0
        return decode_attention(heads, *weights, eps, cos, sin, *self)


class PrefillAttention(NamedTuple):
    """For one layer of a prefill: the first `length` keys and values go to `rows` of the cache, `[batch]` int64.

    Queries see only the positions of this forward pass: the first `length` causally, the others by `mask`, `[batch, 1,
    positions - length, positions]` bool. These are two calls of SDPA: the causal one is fast, and FlexAttention would
    compile for each shape.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    length: int
    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attention`."""
        n = self.length
        self.keys[self.rows, :, :n] = k[:, :, :n]
        self.values[self.rows, :, :n] = v[:, :, :n]
        groups = 1
        if q.dtype == torch.float32:
            # with grouped heads only SDPA's flash kernel is fused, and it takes no float32; others need n² scores
            groups = q.shape[1] // k.shape[1]
        keys, values = (part[:, :, :n].repeat_interleave(groups, dim=1) for part in (k, v))
        clean = scaled_dot_product_attention(q[:, :, :n], keys, values, is_causal=True, enable_gqa=True)
        if q.shape[2] == n:
            return clean
        # the query heads of a key/value head as rows, so that keys and values are not copied for each
        rows = q[:, :, n:].unflatten(1, (k.shape[1], -1))
        seen = self.mask.repeat(1, 1, rows.shape[2], 1)
        out = scaled_dot_product_attention(rows.flatten(2, 3), k, v, attn_mask=seen)
        return torch.cat([clean, out.view_as(rows).flatten(1, 2)], dim=2)


CachedAttention = StepAttention | FusedStepAttention | PrefillAttention
# what a layer takes as its mask
Attended = Mask | KeySource | CachedAttention


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | KeySource | PrefillAttention, flash: bool = False
) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`.

    q: `[batch, n_heads, positions, head_dim]`; k, v: `[batch, n_kv_heads, positions, head_dim]`; returns q's shape.
    mask: a BlockMask runs FlexAttention; a bool tensor `[batch, 1, positions, positions]` runs SDPA; None is causal.
    A KeySource replaces k and v by others: a cache, or those of all ranks; for PrefillAttention see there.
    flash: FlexAttention uses FlashAttention-4's kernels.
    """
    if isinstance(mask, PrefillAttention):
        return mask.attend(q, k, v)
    if mask is not None and not isinstance(mask, (BlockMask, Tensor)):
        k, v = mask.attended(k, v)
        mask = mask.mask
    if isinstance(mask, BlockMask):
        # FlexAttention is fused only when compiled. Below 128 queries "AUTO" takes its decoding kernel, for which torch
        # 2.11 finds no configuration where the queries of all heads that share a key are more than a tile
        attend: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
        return attend(
            q,
            k,
            v,
            block_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options={"BACKEND": "FLASH" if flash else "TRITON"},
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
