"""Line charts as SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tidar.config.files import write_atomically

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 320, 56, 150, 36, 44
COLORS = ("#2e62aa", "#de7830", "#3a8f5c", "#8e4b9e", "#b03a48", "#6b7280")


def line_chart(
    path: Path, title: str, x_title: str, ticks: Sequence[str], series: Mapping[str, Sequence[float | None]]
) -> None:
    """Writes a chart of lines over common ticks. series: name -> a value for each tick, None where there is none.

    The vertical axis begins at 0.
    """
    highest = max((value for values in series.values() for value in values if value is not None), default=0) or 1
    step = next(s for s in (10.0**e * m for e in range(-6, 7) for m in (1, 2, 5)) if highest / s <= 5)
    top = step * -(-highest // step)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(index: int) -> float:
        return LEFT + across * (index + 0.5) / len(ticks)

    def y(value: float) -> float:
        return TOP + down * (1 - value / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{LEFT + across / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>',
    ]
    for number in range(round(top / step) + 1):
        value = number * step
        parts.append(f'<path d="M{LEFT} {y(value):.1f}h{across}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for index, tick in enumerate(ticks):
        parts.append(f'<text x="{x(index):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(tick)}</text>')
    for number, (name, values) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        points = [(x(index), y(value)) for index, value in enumerate(values) if value is not None]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points]
        at = TOP + 14 + 18 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {at - 4}h16" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 34}" y="{at}">{escape(name)}</text>')
    write_atomically(path, "\n".join([*parts, "</svg>"]) + "\n")
