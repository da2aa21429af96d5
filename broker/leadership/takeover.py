"""The candidate's side of a switchover: asks the master to close its tables (`handover` is the master's)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.leadership.asking import Answer
from pmgsync.core.document import ClusterDocument
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from

HANDED_OVER = 0.8
"""The share of a lease in which a switchover must be through: a lease after it has closed the master takes up again."""
AGAIN_S = 0.3
REFUSALS_S = 8.0
"""For so long it is asked again when it refuses for a reason that passes: this node is too far behind, mostly."""
_CLOSED_BY_HAND = (
    "if its database is lost, stop pmgsync-broker there (systemctl stop pmgsync-broker) and run `pmgcm promote` again"
)


class Takeover:
    """One attempt to have the master hand over.

    Attributes:
        goal: LSN at which the closed master's chain ends; None: it has not closed yet.
        incarnation: of that chain.
        failed: why it has not closed, None while that is not known.
    """

    def __init__(
        self,
        document: ClusterDocument,
        ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool],
        send: Callable[[int, Mapping[str, Any], Sequence[bytes]], bool],
        *,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            document: the one in force.
            ask, send: reach a member.
            changed: is called when the master has answered.
        """
        self.goal: int | None = None
        self.incarnation = 0
        self.failed: PmgsyncError | None = None
        self._document = document
        self._ask = ask
        self._send = send
        self._changed = changed
        self._clock = clock
        self._asked = self._waits = self._over = False
        self._ask_at = self._closed_at = 0.0
        self._refused_at: float | None = None

    def ask(self) -> None:
        """Ask the master, unless it has not answered yet."""
        if self._waits or self._clock() < self._ask_at:
            return
        self._asked = self._waits = True
        message = {"op": "handover", "epoch": self._document.epoch}
        if not self._ask(self._document.master, message, self._answered, ()):
            self.failed = UnreachableError("the master is not connected any more", hint="run `pmgcm promote` again")

    def _answered(self, message: Message, _: Sequence[bytes]) -> None:
        self._waits = False
        if message["op"] == "error":
            self._refused(error_from(message))
        elif self._over:
            self._send(self._document.master, {"op": "handover.cancel"}, ())
            return
        else:
            result = message["result"]
            self._closed_at = self._clock()
            self.incarnation, self.goal = int(result["incarnation"]), int(result["lsn"])
        self._changed()

    def _refused(self, error: PmgsyncError) -> None:
        now = self._clock()
        self._refused_at = self._refused_at or now
        if error.recoverable and now - self._refused_at < REFUSALS_S:
            self._ask_at = now + AGAIN_S
            return
        error.hint = error.hint or _CLOSED_BY_HAND
        self.failed = error

    @property
    def late(self) -> bool:
        """True when the master has closed, and will take up again soon."""
        return self.goal is not None and self._clock() - self._closed_at > (
            HANDED_OVER * self._document.lease_ms / 1000
        )

    def cancel(self) -> None:
        """Have the master go on, if it was asked to close."""
        self._over = True
        if self._asked:
            self._send(self._document.master, {"op": "handover.cancel"}, ())
