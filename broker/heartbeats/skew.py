"""How far a member's clock is from this node's, estimated from its heartbeats. Pure; no clock is read."""

from __future__ import annotations

from collections import deque

SAMPLES = 20
"""Heartbeats that are compared: those of ten seconds, so that a clock that was corrected soon shows."""
WARN_S = 1.0
"""A difference that is worth a warning; less may be the network."""


class ClockSkew:
    """The newest differences between the time in a member's heartbeats and this node's clock when they came."""

    def __init__(self) -> None:
        self._ahead_us: deque[int] = deque(maxlen=SAMPLES)

    @property
    def seconds(self) -> float | None:
        """How far the member's clock is ahead, negative when it is behind; None before the first heartbeat.

        Too low by the travel time of the fastest heartbeat; all others travelled longer.
        """
        return max(self._ahead_us) / 1e6 if self._ahead_us else None

    def note(self, sent_us: int, heard_us: int) -> None:
        """Note a heartbeat: when it was sent by the member's clock and when it was heard by this node's, in µs."""
        self._ahead_us.append(sent_us - heard_us)
