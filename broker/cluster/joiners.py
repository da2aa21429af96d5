"""Nodes that are joining, as the master sees them: how far each is, and which has fallen silent.

A node is *joining* from its admission until it says that its copy is in place. It has no vote and nobody waits for it.
When nothing is heard of it for a while the master removes it: an interrupted join leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

SILENCE_S = 30.0
"""A joining node speaks every other second, also while it builds indexes."""
MAX_PHASE = 60

Progress = Mapping[str, Any]


class Joiners:
    """The joining members; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[int, float] = {}
        self._progress: dict[int, dict[str, Any]] = {}

    def expect(self, joining: Set[int]) -> None:
        """Set which members are joining; the silence of a new one counts from now."""
        now = self._clock()
        self._heard = {cid: self._heard.get(cid, now) for cid in joining}
        self._progress = {cid: told for cid, told in self._progress.items() if cid in joining}

    def heard(self, cid: int) -> None:
        """Note that a member was heard; one that is not joining is ignored."""
        if cid in self._heard:
            self._heard[cid] = self._clock()

    def tell(self, cid: int, message: Mapping[str, Any]) -> None:
        """Take over how far a node says it is; what is not a number counts as 0."""
        if cid in self._heard:
            numbers = {key: message.get(key) for key in ("bytes", "rows", "bytes_total")}
            self._progress[cid] = {
                "phase": str(message.get("phase", ""))[:MAX_PHASE],
                **{key: value if type(value) is int and value >= 0 else 0 for key, value in numbers.items()},
            }

    def progress(self, cid: int) -> Progress | None:
        """Return how far a joining node is: phase, bytes, rows, bytes_total; None when it has not said."""
        return self._progress.get(cid)

    def silent(self) -> list[int]:
        """Return the joining nodes of which nothing was heard for too long."""
        now = self._clock()
        return sorted(cid for cid, heard in self._heard.items() if now - heard > SILENCE_S)
