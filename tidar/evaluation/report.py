"""The results of an evaluation as lines of text."""

from collections.abc import Sequence
from typing import Any

from tidar.config import aligned
from tidar.evaluation.speed import Decoded


def decoding_lines(measured: dict[str, Decoded]) -> list[str]:
    """A table of what `measure_speed` returns, the speed-up, and how many tokens the steps added."""
    rows = [["decoding", "tokens", "forwards", "tokens/forward", "tokens/s"]]
    for mode, decoded in measured.items():
        rate = f"{decoded.tokens_per_second:,.1f}"
        rows.append([mode, f"{decoded.tokens:,}", f"{decoded.forwards:,}", f"{decoded.tokens_per_forward:.3f}", rate])
    lines = table(rows)
    first = next(iter(measured.values()))
    if len(measured) > 1:
        lines.append(f"speed-up over autoregressive decoding: {speed_up(measured):.2f}")
    steps = sum(first.accepted.values())
    shares = [f"{n}: {first.accepted[n] / steps:.1%}" for n in sorted(first.accepted)]
    return [*lines, f"tokens accepted in a step: {'  '.join(shares)}"]


def speed_up(measured: dict[str, Decoded]) -> float:
    """Tokens per second of the first mode by those of mode "ar"."""
    return next(iter(measured.values())).tokens_per_second / measured["ar"].tokens_per_second


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of columns: the first to the left, the others to the right."""
    return [line.rstrip() for line in aligned([[str(cell) for cell in row] for row in rows], n_left=1)]
