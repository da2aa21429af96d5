"""Backoff: pauses between attempts that grow with each failure, up to a longest one. Pure: no clock, no randomness."""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """The pauses of one thing that is tried again and again.

    Attributes:
        pause_s: seconds that the next pause lasts, jitter aside.
    """

    def __init__(
        self, first_s: float, longest_s: float, *, factor: float = 2.0, jitter: Callable[[], float] | None = None
    ) -> None:
        """Begin with the first pause.

        Args:
            factor: each pause is so many times as long as the one before.
            jitter: returns a factor for each pause, so that many that failed together do not all try again at one
                moment; None: no factor.
        """
        self._first_s, self._longest_s, self._factor = first_s, longest_s, factor
        self._jitter = jitter
        self.pause_s = min(first_s, longest_s)

    def failed(self) -> float:
        """Note a failure; return the seconds to wait before the next attempt."""
        pause = self.pause_s
        self.pause_s = min(pause * self._factor, self._longest_s)
        return pause * self._jitter() if self._jitter is not None else pause

    def succeeded(self) -> None:
        """Begin with the first pause again."""
        self.pause_s = min(self._first_s, self._longest_s)
