"""A bound for log lines whose number others choose."""

from __future__ import annotations

from collections.abc import Callable

A_MINUTE = 20
WINDOW_S = 60.0


class LogLimit:
    """So many lines a minute; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._window = float("-inf")
        self._written = 0
        self._left_out = 0

    def take(self) -> bool:
        """Return True when a line may be written now; False counts it as left out."""
        now = self._clock()
        if now - self._window >= WINDOW_S:
            self._window, self._written = now, 0
        if self._written >= A_MINUTE:
            self._left_out += 1
            return False
        self._written += 1
        return True

    def left_out(self) -> int:
        """Return how many lines were left out since this was last asked."""
        count, self._left_out = self._left_out, 0
        return count
