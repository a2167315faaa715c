"""Attention and its backends. The mask that a model is given decides which one runs."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tidar.config import UserError
from tidar.kernels.compiling import compiled

Mask = BlockMask | Tensor | None

# where FlashAttention-4's kernels under FlexAttention were seen to be right: types, size of heads, generation of GPUs
FLASH_DTYPES, FLASH_HEAD_DIM, FLASH_CAPABILITY = (torch.bfloat16, torch.float16), 128, 9


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, flash: bool = False) -> Tensor:
    """Grouped-query attention, scaled by `head_dim ** -0.5`.

    q: `[batch, n_heads, positions, head_dim]`; k, v: `[batch, n_kv_heads, positions, head_dim]`; returns q's shape.
    mask: a BlockMask runs FlexAttention; a bool tensor `[batch, 1, positions, positions]` runs SDPA; None is causal.
    flash: FlexAttention with FlashAttention-4's kernels.
    """
    if isinstance(mask, BlockMask):
        # it fuses only when compiled
        attend = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
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


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = FLASH_HEAD_DIM,
    deterministic: bool = False,
) -> str:
    """What model.attention_backend means here: "flash", "flex" or "sdpa".

    dtype: of the arithmetic. Raises UserError where the device cannot train so.
    """
    if backend in ("flex", "flash") and device.type != "cuda":
        raise UserError(f"model.attention_backend = {backend}: has no backward pass without CUDA; use sdpa or auto")
    if device.type != "cuda":
        return "sdpa"
    obstacle = _flash_obstacle(device, dtype, head_dim, deterministic) if backend in ("auto", "flash") else None
    if backend == "flash" and obstacle:
        raise UserError(f"model.attention_backend = flash: {obstacle}; use flex or auto")
    if backend == "auto":
        backend = "flex" if obstacle else "flash"
    if backend == "flash":
        # compiled for half a minute, its kernels are kept on disk for the next process
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    return backend


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str | None:
    """Why FlashAttention-4's kernels cannot be used, None where they can."""
    try:
        installed = find_spec("flash_attn.cute") is not None
    except ImportError:
        installed = False
    if not installed:
        return "is not installed: pip install -e '.[flash]'"
    if torch.cuda.get_device_capability(device)[0] != FLASH_CAPABILITY:
        return f"needs a Hopper GPU, not {torch.cuda.get_device_name(device)}"
    if dtype not in FLASH_DTYPES:
        return f"needs training.mixed_precision_param = bfloat16 or float16, not {dtype}"
    if head_dim != FLASH_HEAD_DIM:
        return f"needs heads of {FLASH_HEAD_DIM}, not {head_dim}"
    if deterministic:
        return "training.deterministic = true: its backward pass does not repeat bit for bit"
    return None
