"""An allowance: so much in a second, and so much at once. Pure; the clock is given."""

from __future__ import annotations

from collections.abc import Callable

MESSAGE_BYTES = 256
"""What a message costs beside its bytes: many small ones are work, too."""


class Allowance:
    """What is taken is made up for by time."""

    def __init__(self, clock: Callable[[], float], per_s: float, most: float) -> None:
        """Begin with the whole of it.

        Args:
            clock: seconds, never backwards.
            per_s: bytes that are made up for in a second.
            most: bytes that may come at once.
        """
        self._clock = clock
        self._per_s = per_s
        self._most = most
        self._left = most
        self._at = clock()

    def takes(self, size: int) -> bool:
        """Take a message of so many bytes; False when it is too much now."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now
        if size + MESSAGE_BYTES > self._left:
            return False
        self._left -= size + MESSAGE_BYTES
        return True
