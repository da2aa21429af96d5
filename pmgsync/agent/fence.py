"""The fence as two threads of the capture worker know it: what the broker wants, and what stands in the database."""

from __future__ import annotations

import threading


class Fence:
    """Whether this node, as master, is fenced: its triggers stand, and its lease decides. For several threads."""

    def __init__(self) -> None:
        self._changed = threading.Event()
        self._wanted: bool | None = None
        self._epoch = 0
        self._stands: tuple[int, bool] | None = None

    @property
    def wanted(self) -> bool | None:
        """What the broker said last; None: nothing yet, so leave everything as it is."""
        return self._wanted

    def want(self, epoch: int, *, fenced: bool) -> None:
        """Take over what the broker says for an epoch; what is new is done at once."""
        if (epoch, fenced) != (self._epoch, self._wanted):
            self._epoch, self._wanted = epoch, fenced
            self._changed.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the broker wants something else, at most so long; True when it does."""
        changed = self._changed.wait(timeout_s)
        self._changed.clear()
        return changed

    def stands(self, epoch: int, *, fenced: bool) -> None:
        """Note that the guard stands as it should in an epoch, on all tables; not fenced: another is the master, or
        nothing is refused.
        """
        self._stands = (epoch, fenced)

    def refuses(self, epoch: int) -> bool:
        """True when this node is a slave in an epoch, and its guard stands."""
        return self._stands == (epoch, False)

    @property
    def is_as_wanted(self) -> bool:
        """True when the guard stands as the broker wants it."""
        return self._stands == (self._epoch, self._wanted)
