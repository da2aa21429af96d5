"""The fence as two threads of the capture worker know it: what the broker wants, and what stands in the database."""

from __future__ import annotations

import threading


class Fence:
    """Whether this node, as master, is fenced: its triggers stand, and its lease decides. For several threads."""

    def __init__(self) -> None:
        self._changed = threading.Event()
        self._lock = threading.Lock()
        self._wanted: tuple[int, bool] | None = None
        self._stands: tuple[int, bool] | None = None

    def want(self, epoch: int, *, fenced: bool) -> None:
        """Take over what the broker says for an epoch; what is new is done at once."""
        with self._lock:
            if self._wanted != (epoch, fenced):
                self._wanted = epoch, fenced
                self._changed.set()

    def wanted(self, epoch: int) -> bool | None:
        """Return what the broker wants of the master of an epoch; None: it has said nothing of that one, or speaks of a
        later one already. Then everything is to be left as it is: this node may not be the master any more.

        A master that is not fenced is about to be opened by who asks: from here on the guard stands no more.
        """
        with self._lock:
            if self._wanted is None or self._wanted[0] != epoch:
                return None
            if not self._wanted[1] and self._stands != self._wanted:
                self._stands = None
            return self._wanted[1]

    def wait(self, timeout_s: float) -> bool:
        """Wait until the broker wants something else, at most so long; True when it does."""
        if not self._changed.wait(timeout_s):
            return False  # what is wanted from now on is not to be cleared
        self._changed.clear()
        return True

    def stands(self, epoch: int, *, fenced: bool) -> None:
        """Note that the guard stands as it should in an epoch, on all tables; not fenced: another is the master, or
        nothing is refused.
        """
        with self._lock:
            self._stands = epoch, fenced

    def refuses(self, epoch: int) -> bool:
        """True when this node is a slave in an epoch, and its guard stands."""
        return self._stands == (epoch, False)

    @property
    def is_as_wanted(self) -> bool:
        """True when the guard stands as the broker wants it."""
        with self._lock:
            return self._wanted is not None and self._stands == self._wanted
