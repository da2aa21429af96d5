"""What other nodes have said of trees and was refused, for status and log: who, and why."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

SHOWN_S = 60.0
"""For so long after the last one a refusal is shown."""
SAME_S = 10.0
"""A reason that comes again within this goes on; it is logged once."""


@dataclass(slots=True)
class _Refusal:
    reason: str
    since: float
    last: float


class Refusals:
    """The newest refusal of each node, so that nobody can fill memory or log with them."""

    def __init__(self) -> None:
        self._by_origin: dict[int, tuple[_Refusal, float]] = {}

    def note(self, origin: int, reason: str, *, after_s: float = 0.0) -> None:
        """Note one.

        Args:
            after_s: it is only shown when it has been going on for so long: nodes hear of a promotion one after the
                other.
        """
        now = time.monotonic()
        held, _ = self._by_origin.get(origin, (None, 0.0))
        if held is not None and held.reason == reason and now - held.last < SAME_S:
            if held.last - held.since < after_s <= now - held.since:
                log.warning("action=refused origin=%d reason=%s", origin, reason)
            held.last = now
            return
        if held is not None and now - held.last < 1.0 and held.reason != reason:
            # One a second of each node: whoever sends many different ones is shown by any of them.
            held.last = now
            return
        self._by_origin[origin] = _Refusal(reason, now, now), after_s
        if not after_s:
            log.warning("action=refused origin=%d reason=%s", origin, reason)

    def alerts(self) -> list[str]:
        """Return a sentence for each node of which something was refused in the last minute."""
        now = time.monotonic()
        return [
            f"what node {origin} says of trees of files is refused: {held.reason}"
            for origin, (held, after_s) in sorted(self._by_origin.items())
            if now - held.last < SHOWN_S and held.last - held.since >= after_s
        ]
