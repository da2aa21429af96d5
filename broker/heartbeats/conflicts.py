"""Conflict counters: the values that lost against others, by table and column, few enough for a heartbeat. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pmgsync.core.positions import MAX_LSN

MAX_NAMES = 50
MAX_NAME = 200
OTHER = "other"
"""All that are not among the MAX_NAMES greatest; no table and column are called so, they have dots between them."""


def read_counters(value: object) -> dict[str, int]:
    """Return the counters that a worker or a member has sent; what is not a name with a positive int is left out."""
    if not isinstance(value, Mapping):
        return {}
    return add_up([{name: count for name, count in value.items() if type(name) is str and type(count) is int}])


def add_up(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return counters added up: the greatest by name, the greatest first, all others together as OTHER."""
    found: Counter[str] = Counter()
    for each in counters:
        for name, count in each.items():
            if count > 0:
                found[name[:MAX_NAME]] += count
    rest = found.pop(OTHER, 0)
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rest += sum(count for _, count in ranked[MAX_NAMES:])
    kept = dict(ranked[:MAX_NAMES]) | ({OTHER: rest} if rest else {})
    # MessagePack has no greater integers, and a worker may send any number.
    return {name: min(count, MAX_LSN) for name, count in kept.items()}
