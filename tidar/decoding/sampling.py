"""Tokens from logits: temperature, top-k, top-p, and draws that depend on (seed, prompt, position) alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

# splitmix64's constants (Steele, Lea and Flood, 2014), as signed 64-bit integers
GAMMA, MIX_1, MIX_2 = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the arg-max. top_k 0, top_p 1: no limit.

    draft_mix: beta in `beta * AR logits + (1 - beta) * logits of the mask at the same position`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draft_mix: float = 1.0


def choose(logits: Tensor, sampling: Sampling, keys: Tensor, positions: Tensor) -> Tensor:
    """A token for each row of logits `[batch, n, vocab]`: `[batch, n]` int64.

    keys: random key of each sequence `[batch]` int64, see `prompt_key`. positions: of the chosen tokens, `[batch, n]`.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = distribution(logits, sampling)
    cumulative = probabilities.cumsum(dim=-1)
    uniform = uniforms(keys[:, None], positions)[..., None]
    # inverse transform sampling: the first token whose cumulative probability exceeds the draw
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, then top-k, then top-p, float64, of logits `[..., vocab]`.

    top_p keeps the fewest tokens whose probabilities sum to at least top_p; of equal ones those with the lower id.
    """
    logits = logits.double() / sampling.temperature
    probabilities = logits.softmax(dim=-1)
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked[..., sampling.top_k :] = -torch.inf
    ranked = ranked.softmax(dim=-1)
    before = ranked.cumsum(dim=-1) - ranked
    ranked = ranked.where(before < sampling.top_p, 0)
    return torch.zeros_like(ranked).scatter_(-1, order, ranked)


def prompt_key(seed: int, index: int) -> int:
    """The random key of a prompt, by its index."""
    return _mix(_mix(seed) + index)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (key, position), float64: splitmix64 as a counter-based generator.

    The same on every device, and for every batch, block size and mode.
    """
    bits = _mix_tensor(keys + positions * GAMMA)
    return (bits >> 11 & 2**53 - 1).double() * 2.0**-53


def _mix_tensor(x: Tensor) -> Tensor:
    """splitmix64's output function, on int64 that wraps."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift of the unsigned 64-bit integer that an int64 stands for."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(number: int) -> int:
    """`_mix_tensor` of the next state of one integer, as a signed 64-bit integer."""
    x = (number + GAMMA) % 2**64
    x = (x ^ x >> 30) * MIX_1 % 2**64
    x = (x ^ x >> 27) * MIX_2 % 2**64
    return ((x ^ x >> 31) + 2**63) % 2**64 - 2**63
