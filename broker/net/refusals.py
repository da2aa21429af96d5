"""What was refused to others at this node's TCP ports: counted, logged seldom, and shown in status while it is recent.

Who is refused chooses how often, and partly with which words. So neither the memory nor the log may grow with that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker.net.log_limit import LogLimit

log = logging.getLogger(__name__)

RECENT_S = 300.0
"""For so long status shows a refusal."""
MAX_KNOWN = 200
"""Ports, addresses and reasons that are remembered together; the one refused last longest ago is forgotten first."""
AGAIN_S = 600.0
"""Seconds between two log lines on the same port, address and reason."""


@dataclass(slots=True)
class Refusal:
    """What one address was refused at one port, for one reason; times on the monotonic clock."""

    port: str
    address: str
    reason: str
    count: int = 0
    last: float = 0.0
    logged: float = float("-inf")


class Refusals:
    """The refusals of the last minutes; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[tuple[str, str, str], Refusal] = {}
        self._limit = LogLimit(clock)

    def note(self, port: str, address: str, reason: str) -> None:
        """Count a refusal.

        Args:
            port: `events`, `control`, `join` or `key`.
            address: whose it was, "" when that is not known.
            reason: a sentence's end, such as "its key is not a member's".
        """
        now, key = self._clock(), (port, address, reason)
        refusal = self._known.pop(key, None)
        if refusal is None or now - refusal.last > RECENT_S:
            refusal = Refusal(port, address, reason)
        refusal.count += 1
        refusal.last = now
        self._known[key] = refusal
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._log(refusal, now)

    def _log(self, refusal: Refusal, now: float) -> None:
        if now - refusal.logged < AGAIN_S or not self._limit.take():
            return
        if count := self._limit.left_out():
            log.warning("action=refused-more count=%d", count)
        refusal.logged = now
        log.warning(
            "action=connection-refused port=%s address=%s count=%d reason=%s",
            refusal.port, refusal.address or "unknown", refusal.count, refusal.reason,
        )  # fmt: skip

    def recent(self) -> list[dict[str, Any]]:
        """Return what was refused lately, the newest first: port, address, reason, count, seconds since the last."""
        now = self._clock()
        return [
            {
                "port": refusal.port,
                "address": refusal.address,
                "reason": refusal.reason,
                "count": refusal.count,
                "last_s": round(now - refusal.last, 1),
            }
            for refusal in reversed(self._known.values())
            if now - refusal.last <= RECENT_S
        ]
