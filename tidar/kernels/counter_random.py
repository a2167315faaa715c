"""Random numbers that are functions of (key, counter): the same on every device, however a tensor is sharded."""

from functools import cache

import torch
from torch import Tensor

# splitmix64's constants (Steele, Lea and Flood, 2014), as signed 64-bit integers
GAMMA, MIX_1, MIX_2 = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
CELLS = 2**16  # of equal probability, in which a normal number is uniform


def random_bits(keys: Tensor | int, counters: Tensor) -> Tensor:
    """64 random bits for each (key, counter), as int64: splitmix64 as a counter-based generator."""
    return _mix_tensor(keys + counters * GAMMA)


def uniforms(keys: Tensor, counters: Tensor) -> Tensor:
    """One number in [0, 1) for each (key, counter), float64."""
    return (random_bits(keys, counters) >> 11 & 2**53 - 1).double() * 2.0**-53


def normals(key: int, counters: Tensor) -> Tensor:
    """One standard normal number for each counter, float32, none above 4.7.

    By a table of quantiles and exact arithmetic between them: logarithms and cosines are rounded differently on
    different devices.
    """
    bits = random_bits(key, counters)
    quantiles = _quantiles(counters.device)
    cell = bits & CELLS - 1
    lower = quantiles[cell]
    within = (bits >> 16 & 2**24 - 1).float() * 2.0**-24
    # not torch.lerp, whose product and sum are rounded once on some devices
    return lower + within * (quantiles[cell + 1] - lower)


@cache
def _quantiles(device: torch.device) -> Tensor:
    """Bounds of the cells, `[CELLS + 1]` float32, of variance 1."""
    bounds = torch.special.ndtri(torch.arange(1, CELLS, dtype=torch.float64) / CELLS)
    end = torch.special.ndtri(torch.tensor([1 - 1 / (8 * CELLS)], dtype=torch.float64))
    bounds = torch.cat([-end, bounds, end])
    lower, upper = bounds[:-1], bounds[1:]
    variance = ((lower**2 + lower * upper + upper**2) / 3).mean()
    return (bounds / variance.sqrt()).float().to(device)


def mix(number: int) -> int:
    """A key from a number: splitmix64's output for its next state, as a signed 64-bit integer."""
    x = (number + GAMMA) % 2**64
    x = (x ^ x >> 30) * MIX_1 % 2**64
    x = (x ^ x >> 27) * MIX_2 % 2**64
    return ((x ^ x >> 31) + 2**63) % 2**64 - 2**63


def _mix_tensor(x: Tensor) -> Tensor:
    """splitmix64's output function, on int64 that wraps."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift of the unsigned 64-bit integer that an int64 stands for."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
