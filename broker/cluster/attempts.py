"""Wrong tokens and passwords: counted by address and in all, answered late, and refused unseen when too many."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pmgsync.errors import TooManyAttemptsError

WINDOW_S = 60.0
MAX_OF_ADDRESS = 5
"""Wrong attempts from one address within the window; then it has to wait."""
MAX_OF_ALL = 30
"""The same from all addresses together: an attacker may have many."""
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 2.0
MAX_ADDRESSES = 10_000
"""Addresses that are remembered; the one whose last wrong attempt is oldest is forgotten first."""


class Attempts:
    """The wrong attempts of the last minute; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._all: deque[float] = deque(maxlen=MAX_OF_ALL)
        self._of: dict[str, deque[float]] = {}

    def check(self, address: str) -> None:
        """Refuse an address that has to wait.

        Raises:
            TooManyAttemptsError: when it has.
        """
        horizon = self._clock() - WINDOW_S
        mine = self._of.get(address)
        if mine is not None and len(mine) >= MAX_OF_ADDRESS and mine[0] > horizon:
            raise TooManyAttemptsError(
                f"too many wrong tokens or passwords came from {address}", hint="wait a minute, then try again"
            )
        if len(self._all) >= MAX_OF_ALL and self._all[0] > horizon:
            raise TooManyAttemptsError(
                "too many wrong tokens or passwords were tried, the door is closed for a minute",
                hint="wait a minute, then try again",
            )

    def wrong(self, address: str) -> float:
        """Count a wrong attempt and return for how many seconds its answer is to be held back."""
        now = self._clock()
        self._all.append(now)
        mine = self._of.pop(address, None) or deque(maxlen=MAX_OF_ADDRESS)
        mine.append(now)
        self._of[address] = mine
        while len(self._of) > MAX_ADDRESSES:
            del self._of[next(iter(self._of))]
        recent = sum(when > now - WINDOW_S for when in mine)
        return min(FIRST_DELAY_S * float(1 << (recent - 1)), LONGEST_DELAY_S)
