"""Rotary position embeddings (arXiv 2104.09864) and their published extensions to longer contexts."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed for contexts longer than in pretraining.

    linear: all are divided by `factor`. yarn (arXiv 2309.00071, section 3): those with more than `beta_fast` rotations
    within `original_max_position_embeddings` stay, those with less than `beta_slow` are divided by `factor`, with a
    ramp between; `attention_factor` multiplies cosines and sines; `truncate` rounds the ramp's ends.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def rotary(position_ids: Tensor, frequencies: Tensor, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions `[batch, positions]`, each `[batch, 1, positions, head_dim]`, float32.

    frequencies: see `inverse_frequencies`.
    """
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    attention_factor = scaling.attention_factor if scaling else 1.0
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[batch, heads, positions, head_dim]` rotated by its positions; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(heads: Tensor, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `[batch, heads, positions, head_dim]`, of heads that are grouped by key/value head.

    heads: `[batch, positions, n_heads + 2 * n_kv_heads, head_dim]`; a group is its query heads, its key, its value.
    """
    groups = heads.unflatten(2, (n_kv_heads, -1))
    q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@lru_cache
def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions, `[head_dim / 2]` float32.

    Computed once, on the CPU: another device's rounding would change the rotation of far positions.
    """
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    frequencies = 1.0 / wavelengths
    if scaling and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling:
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
        frequencies = (1.0 / (scaling.factor * wavelengths)) * (1 - kept) + frequencies * kept
    return frequencies.to(device)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How far each pair of dimensions is interpolated, from 0 to 1, `[head_dim / 2]`."""

    def pair_with_rotations(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
