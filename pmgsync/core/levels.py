"""Levels: changes that must keep their order only among those of one key, as few sets of different keys. Pure, no I/O.

Invariant: executing the levels one after the other, each as a set, executes the changes of every key in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Kind = TypeVar("Kind")
Row = TypeVar("Row")


class Levels(Generic[Kind, Row]):
    """Changes by level: the n-th change of a key is in the n-th level, so no level has two of one key."""

    __slots__ = ("_counts", "_levels")

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._levels: list[dict[Kind, list[Row]]] = []

    def add(self, key: Hashable, kind: Kind, row: Row) -> None:
        """Add a change, behind all of its key."""
        level = self._counts.get(key, 0)
        self._counts[key] = level + 1
        if level == len(self._levels):
            self._levels.append(defaultdict(list))
        self._levels[level][kind].append(row)

    def __iter__(self) -> Iterator[tuple[Kind, list[Row]]]:
        """Yield the sets in order: the kind of change, and the rows."""
        for level in self._levels:
            yield from level.items()
