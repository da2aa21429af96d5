"""Two kinds of picture, as SVG text: lines over a linear or logarithmic axis, with axes, ticks and a legend. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 180, 50, 60
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df")
MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Return round numbers that cover a range: of an axis that is logarithmic 1, 2 and 5 of each power of ten."""
    if logarithmic:
        # One power more on both sides: the logarithm of what is all but a power of ten is that power.
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        return [value for power in powers for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)]
    # One value alone has a range too; without it the step would become 0.
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    step = 10.0 ** math.floor(math.log10(span))
    while span / step < 4:
        step /= 2
    first = math.floor(low / step)
    return [step * number for number in range(first, math.ceil(high / step) + 1)]


def thinned(points: Points) -> Points:
    """Return at most MOST_POINTS of the points, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(number * step)] for number in range(MOST_POINTS)]


def distribution(latencies: Sequence[float]) -> Points:
    """Return the points (latency, share of the transactions in per cent that were at least as fast)."""
    ordered = sorted(latencies)
    return thinned([(value, 100 * number / len(ordered)) for number, value in enumerate(ordered, 1)])


def chart(title: str, x_name: str, y_name: str, series: Mapping[str, Points], *, logarithmic: bool = False) -> str:
    """Return the picture of some lines.

    Args:
        series: name -> points; x must be greater than 0 on a logarithmic axis.
        logarithmic: the x axis is.

    Raises:
        ValueError: when there is nothing to draw.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        raise ValueError("nothing to draw")
    x_ticks = ticks(min(xs), max(xs), logarithmic=logarithmic)
    if logarithmic:
        below = [tick for tick in x_ticks if tick <= min(xs)]
        above = [tick for tick in x_ticks if tick >= max(xs)]
        x_ticks = [tick for tick in x_ticks if below[-1] <= tick <= above[0]]
    y_ticks = ticks(0.0, max(ys), logarithmic=False)
    x_low, x_high, y_high = x_ticks[0], max(x_ticks[-1], x_ticks[0] * (1 + 1e-9)), y_ticks[-1] or 1.0

    def across(x: float) -> float:
        low, high, value = (math.log10(v) for v in (x_low, x_high, x)) if logarithmic else (x_low, x_high, x)
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 22, title, 'style="font-size: 15px"'),
    ]
    for x in x_ticks:
        parts.append(_line(across(x), TOP, across(x), HEIGHT - BOTTOM))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 18, f"{x:g}", 'text-anchor="middle"'))
    for y in y_ticks:
        parts.append(_line(LEFT, up(y), WIDTH - RIGHT, up(y)))
        parts.append(_text(LEFT - 8, up(y) + 4, f"{y:g}", 'text-anchor="end"'))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 15, x_name, 'text-anchor="middle"'))
    parts.append(_text(LEFT, TOP - 6, y_name, 'fill="#57606a"'))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        height = TOP + 12 + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 15}" y="{height - 9}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 33, height + 2, name))
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d0d7de"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>'
