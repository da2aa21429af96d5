"""What all workers share: a session with the local broker, a report every second, and growing pauses after errors."""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pmgsync.config import NodeConfig
from pmgsync.core.backoff import Backoff
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.link import BrokerLink, LinkOverError
from pmgsync.wire.messages import Message, error_from
from pmgsync.wire.waiting import Wakeup

log = logging.getLogger(__name__)

REPORT_S = 0.7
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
JITTER = 0.2
"""Share by which a pause may be shorter or longer, so that the workers of many nodes do not all try at one moment."""
GRACE_S = 3.0
"""An error that may pass by itself is shown as synchronising for so long, and as an error after that."""


class SessionOverError(LinkOverError):
    """The session with the broker must be begun again: it was restarted, or the cluster document has changed."""


class Worker(ABC):
    """One worker process. A subclass works in `session`, which is begun again whenever it ends with an error.

    Attributes:
        split: members on the other side of a split, and that side's newest epoch, as of the session's start.
        departed: nodes that were removed and whose chains are not over here.
        state, alerts, counters, trees, actions: what the next report says (PROTOCOL.md, section 10).
        standing_error: what is wrong with a part of the work while the rest goes on; None when nothing is.
    """

    def __init__(self, config: NodeConfig, name: str, *, longest_pause_s: float = LONGEST_PAUSE_S) -> None:
        self.config = config
        self.name = name
        self.link: BrokerLink | None = None
        self.cid = 0
        self.signed: SignedDocument | None = None
        self.split: dict[int, int] = {}
        self.departed: frozenset[int] = frozenset()
        self.state = "A"
        self.alerts: list[dict[str, str]] = []
        self.counters: dict[str, int] = {}
        self.trees: list[dict[str, Any]] = []
        self.actions: list[dict[str, Any]] = []
        self.standing_error: PmgsyncError | None = None
        self._error: PmgsyncError | None = None
        self._failing_since = 0.0
        self._reported = 0.0
        self._backoff = Backoff(FIRST_PAUSE_S, longest_pause_s, jitter=_jitter)
        self.wakeup = Wakeup()

    @property
    def document(self) -> ClusterDocument:
        """The cluster document as of the session's start."""
        assert self.signed is not None
        return self.signed.document

    @abstractmethod
    def session(self, link: BrokerLink) -> None:
        """Do the work until something ends it."""

    def run(self) -> None:
        """Work until the process is ended; this is the one place where a worker's errors are handled."""
        while True:
            try:
                self._connect()
                assert self.link is not None
                self.session(self.link)
            except LinkOverError as error:
                log.info("action=session-over worker=%s reason=%s", self.name, error.message)
                self._disconnect()
                self._backoff.succeeded()
            except PmgsyncError as error:
                self.fail(error)

    def fail(self, error: PmgsyncError) -> None:
        """Show an error in status and log, and wait before the next try."""
        level = logging.WARNING if error.recoverable else logging.ERROR
        pause_s = self._backoff.failed()
        log.log(level, "action=retry worker=%s pause_s=%.1f error=%s", self.name, pause_s, error)
        if self._error is None:
            self._failing_since = time.monotonic()
        self._error = error
        self._reported = 0.0
        self.rest(pause_s)

    def recovered(self) -> None:
        """Note that the work goes on: the error is over, and the next one begins with a short pause."""
        self._backoff.succeeded()
        if self._error is not None:
            log.info("action=recovered worker=%s", self.name)
            self._error = None
            self._reported = 0.0

    @property
    def report_due(self) -> bool:
        """True when `report` would say something."""
        return time.monotonic() - self._reported >= REPORT_S

    def report(self) -> None:
        """Tell the broker how this worker is, when it is time to.

        Raises:
            SessionOverError: when the broker is gone.
        """
        if self.link is None or not self.report_due:
            return
        self._reported = time.monotonic()
        error = self._error or self.standing_error
        message: Message = {"op": "report", "state": self.state, "error": "", "hint": "", "alerts": self.alerts}
        if self.counters:
            message["counters"] = self.counters
        if self.trees:
            message["trees"] = self.trees
        if self.actions:
            message["actions"] = self.actions
        if error is not None and (not error.recoverable or time.monotonic() - self._failing_since > GRACE_S):
            message |= {"error": error.message, "hint": error.hint}
        elif error is not None:
            message["state"] = "S"
        try:
            self.link.send(message)
        except UnreachableError as gone:
            raise SessionOverError(gone.message) from gone

    def handle(self, message: Message, attachments: Sequence[bytes]) -> None:
        """Handle a message that the work itself does not expect.

        Raises:
            SessionOverError: when it ends the session.
            PmgsyncError: when it is an error.
        """
        if message["op"] == "document":
            data = attachments[0] if attachments else b""
            self.departed = read_departed(message)
            if not self.keeps_session(data):
                raise SessionOverError("the cluster document has changed")
            if _read_split(message) != self.split:
                raise SessionOverError("a split of the cluster has begun, or is over")
        elif message["op"] == "error":
            if message.get("id") == 0 and message.get("error") == UnreachableError.code:
                raise SessionOverError(str(message.get("message")))
            raise error_from(message)

    def keeps_session(self, data: bytes) -> bool:
        """Return True when work goes on as before under a new cluster document (packed; b"" when there is none)."""
        if not data:
            return False
        new = SignedDocument.unpack(data)
        old, self.signed = self.document, new
        same = (old.cluster, old.history) == (new.document.cluster, new.document.history)
        return same and new.document.member(self.cid) is not None

    def rest(self, seconds: float) -> None:
        """Wait, and go on reporting; a message that ends the session ends the wait too."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.link is None:
                time.sleep(left)
                return
            try:
                self.report()
                received = self.link.receive(min(left, REPORT_S))
                if received is not None:
                    self.waiting(*received)
            except LinkOverError:
                self._disconnect()
                return

    def waiting(self, message: Message, attachments: Sequence[bytes]) -> None:
        """Handle a message that comes while the worker waits; answers to work that was given up are dropped."""
        if message["op"] in {"document", "error"}:
            try:
                self.handle(message, attachments)
            except SessionOverError:
                raise
            except PmgsyncError as error:
                log.info("action=late-answer worker=%s error=%s", self.name, error)

    def _connect(self) -> None:
        if self.link is not None:
            return
        link = BrokerLink(self.config.broker_socket, self.name)
        try:
            welcome, parts = link.hello()
            if not welcome["cid"] or not parts:
                raise MembershipError("no cluster defined")
            self.cid, self.signed = welcome["cid"], SignedDocument.unpack(parts[0])
            self.split, self.departed = _read_split(welcome), read_departed(welcome)
        except PmgsyncError:
            link.close()
            raise
        self.link = link

    def _disconnect(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None


def _read_split(message: Message) -> dict[int, int]:
    return {int(cid): int(epoch) for cid, epoch in message.get("split", [])}


def read_departed(message: Message) -> frozenset[int]:
    """Return the removed nodes whose chains are not over here, as a `welcome` or `document` names them."""
    return frozenset(int(cid) for cid in message.get("departed", []))


def _jitter() -> float:
    return random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 -- spreads retries, no secret
