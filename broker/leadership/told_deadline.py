"""What the agent was told of the lease's deadline, and what the database goes by, as far as the agent has confirmed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from pmgsync.wire.messages import Message

REPEAT_S = 1.0
"""So often the agent is told the same again: it may have been started anew."""


class ToldDeadline:
    """Tells the agent until when the database may be written, and takes over what it answers.

    Attributes:
        reign: the newest epoch for which this node's sequences were passed, as far as the agent has said.
        opened_until: until when the database takes writes, as the agent has confirmed.
        guarded: whether the last deadline asked for the fence, and whether the guard stands as it asks; None when the
            agent has not confirmed it.
    """

    def __init__(self, tell: Callable[[Message], bool]) -> None:
        """Begin; `tell` sends the lease worker a message, and returns False when there is none."""
        self.reign = 0
        self.opened_until = -math.inf
        self.guarded: tuple[bool, bool] | None = None
        self._tell = tell
        self._number = 0
        self._told_at = -math.inf
        self._told: deque[tuple[int, float, bool]] = deque()

    @property
    def latest(self) -> float:
        """The latest deadline that the database may go by."""
        return max((until or -math.inf for _, until, _ in self._told), default=-math.inf)

    def again(self) -> None:
        """Have the next `tell` say it in any case; until it is confirmed the database is not taken to be open."""
        self._told_at = self.opened_until = -math.inf

    def forget(self) -> None:
        """Forget what was told: the database is closed."""
        self._told.clear()

    def tell(self, now: float, epoch: int, until: float, *, fenced: bool) -> bool:
        """Tell what has changed, and each second what has not; True when the database may go by it from now on."""
        if self._told and self._told[-1][1:] == (until, fenced) and now - self._told_at < REPEAT_S:
            return False
        self._told_at = now
        self._number += 1
        # Before it is sent: from then on the database may go by it.
        self._told.append((self._number, until, fenced))
        message = {"op": "lease", "number": self._number, "epoch": epoch, "until": until, "fenced": fenced}
        if not self._tell(message):
            self._told.pop()
            self.guarded = None
            return False
        return True

    def confirmed(self, number: int, *, guarded: bool, opened: bool, reign: int) -> float | None:
        """Take over that the agent has written a deadline; return it, or None when it was not told any more.

        Args:
            guarded: the guard stands as the deadline asks for.
            opened: the database goes by it; else it was closed, because the sequences were not passed yet.
            reign: the newest epoch for which they were.
        """
        self.reign = reign
        while self._told and self._told[0][0] < number:
            self._told.popleft()
        if not self._told or self._told[0][0] != number:
            return None
        _, until, fenced = self._told[0]
        self.opened_until = until if opened and guarded else -math.inf
        if number == self._told[-1][0]:
            self.guarded = (fenced, guarded)
        return until
