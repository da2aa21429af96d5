"""What the turns say: medians, percentiles, ratios, and the tables that are printed. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.lines import Turn

Contender = tuple[str, str]
"""System and the synchronous_commit with which it applies, for example ("native", "off")."""


@dataclass(frozen=True)
class Row:
    """A row of the table: what was measured, and each contender's figure."""

    name: str
    title: str
    unit: str
    figures: Mapping[Contender, float]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of the values do not exceed.

    Raises:
        ValueError: when there are none.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def rows_of(name: str, title: str, turns: Mapping[Contender, Sequence[Turn]], *, latency: bool) -> list[Row]:
    """Return a line's rows: the median of the turns' seconds, or median and 99th percentile of all latencies."""
    if not latency:
        return [Row(name, title, "s", {who: statistics.median(t.seconds for t in ts) for who, ts in turns.items()})]
    found = []
    for word, share in (("median", 0.5), ("99th", 0.99)):
        # Of each turn, then the median of the turns: one turn that was disturbed does not make the percentile.
        figures = {
            who: statistics.median(percentile(turn.latencies_ms, share) for turn in ts) for who, ts in turns.items()
        }
        found.append(Row(f"{name} {word}", f"{title}, {word}", "ms", figures))
    return found


def ratio(row: Row, native: Contender, ours: Contender) -> float | None:
    """Return how many times faster ours is; None when one of them was not measured."""
    if native not in row.figures or ours not in row.figures:
        return None
    return row.figures[native] / row.figures[ours]


def label(contender: Contender) -> str:
    """Return a contender as the table names it."""
    return " ".join(filter(None, contender))


def table(rows: Sequence[Row], contenders: Sequence[Contender]) -> str:
    """Return the rows as a Markdown table; ratios compare each of ours with each of native."""
    pairs = [(a, b) for a in contenders if a[0] != "ours" for b in contenders if b[0] == "ours"]
    # With the same setting, and as they are by default; what is off here and on there is no comparison.
    pairs = [(a, b) for a, b in pairs if not (a[1] == "on" and b[1] == "off")]
    head = ["work", "unit", *map(label, contenders), *(f"{label(a)} / {label(b)}" for a, b in pairs)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"{row.figures[who]:.2f}" if who in row.figures else "" for who in contenders]
        ratios = [ratio(row, a, b) for a, b in pairs]
        lines.append([row.title, row.unit, *cells, *("" if r is None else f"{r:.2f}" for r in ratios)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def costs(turns: Mapping[Contender, Sequence[Turn]]) -> str:
    """Return CPU seconds for 100,000 changes, by process, as a Markdown table; what is less than 0.01 is left out."""
    lines = ["| system | process | CPU s for 100,000 changes |", "|---|---|---|"]
    for who, taken in turns.items():
        names = sorted({name for turn in taken for name in turn.cpu_s})
        total = 0.0
        for name in names:
            spent = statistics.median(turn.cpu_s.get(name, 0.0) / turn.changes * 1e5 for turn in taken)
            total += spent
            if spent >= 0.01:
                lines.append(f"| {label(who)} | {name} | {spent:.2f} |")
        lines.append(f"| {label(who)} | all | {total:.2f} |")
    return "\n".join(lines)


def memory(turns: Mapping[Contender, Sequence[Turn]]) -> str:
    """Return the most private memory of each process as a Markdown table."""
    lines = ["| system | process | peak MiB |", "|---|---|---|"]
    for who, taken in turns.items():
        for name in sorted({name for turn in taken for name in turn.peak_mib}):
            peak = max(turn.peak_mib.get(name, 0.0) for turn in taken)
            lines.append(f"| {label(who)} | {name} | {peak:.0f} |")
    return "\n".join(lines)
