"""Tokens from logits: temperature, top-k, top-p, and draws that depend on (seed, prompt, position) alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.kernels.counter_random import mix, uniforms


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and drafted. temperature 0: the arg-max. top_k 0, top_p 1: no limit.

    draft_mix: beta in `beta * AR logits + (1 - beta) * logits of the mask at the same position`.
    lookup: where at least so many last tokens occurred before, what followed them is the draft (see `look_up`),
    elsewhere the most likely tokens of the masks; 0: the latter everywhere.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draft_mix: float = 1.0
    lookup: int = 0


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
    logits = logits.double()
    # the largest is 0, so that even a tiny temperature makes no infinite one
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
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
    return mix(mix(seed) + index)
