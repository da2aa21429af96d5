"""The lease worker: writes the broker's deadline into the database, in a thread of the capture worker.

It has a session with the broker and one with the database of its own, so that nothing that capture or upkeep wait for
holds it up. When this process is frozen or killed the deadline that it has written passes, and the database is closed.
"""

from __future__ import annotations

import logging
import os
import threading

from pmgsync.agent.commit_hold import CommitHold
from pmgsync.agent.fence import Fence
from pmgsync.agent.worker import Worker
from pmgsync.config import NodeConfig
from pmgsync.core.lease import reign_began
from pmgsync.core.membership import SignedDocument
from pmgsync.errors import PmgsyncError, ProtocolError, UnreachableError
from pmgsync.postgres.setup.lease import LeaseSession
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, error_map

log = logging.getLogger(__name__)

NAME = "lease"
LOOK_S = 0.2
"""So often it is looked whether the guard stands meanwhile."""
LOOK_SOON_S = 0.02
"""So often while a new master is to open its tables and cannot yet."""
LONGEST_PAUSE_S = 1.0
"""Between two attempts to reach the database: a master is closed so long."""


class LeaseWorker(Worker):
    """Follows what the broker says of the lease. Its `run` is the thread's."""

    def __init__(self, config: NodeConfig, fence: Fence, hold: CommitHold) -> None:
        super().__init__(config, NAME, longest_pause_s=LONGEST_PAUSE_S)
        self._fence = fence
        self._hold = hold
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._database: LeaseSession | None = None
        self._passed = 0
        self._told: tuple[int, bool, bool] | None = None
        self._held_back: Message | None = None

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._thread.is_alive():
            self._thread.start()

    def _run(self) -> None:
        try:
            self.run()
        except BaseException:
            # The supervisor starts the process anew; without this thread a master would close for good.
            log.exception("action=lease-thread-died")
            os._exit(1)

    def session(self, link: BrokerLink) -> None:
        """Write each deadline that comes, until something ends it."""
        link.send({"op": "serve", "methods": ["lease.shut"]})
        self._forget_told()
        try:
            while True:
                newest: Message | None = None
                received = link.receive(LOOK_S if self._held_back is None else LOOK_SOON_S)
                while received is not None:
                    message, attachments = received
                    match message["op"]:
                        case "lease":
                            # After a pause many have come; only the newest counts.
                            newest = message
                        case "call" if message.get("method") == "lease.shut":
                            # What was said before it must not open again what it closes.
                            newest = self._held_back = None
                            self._shut(link, int(message["id"]))
                        case "cancel" | "credit":
                            pass
                        case _:
                            self.handle(message, attachments)
                    received = link.receive(0)
                if newest is not None:
                    self._take(link, newest)
                elif self._held_back is not None and self._may_open(int(self._held_back["epoch"])):
                    self._take(link, self._held_back)
                elif self._told is not None and not self._told[1] and self._fence.is_as_wanted:
                    self._tell(link, self._told[0], is_open=self._told[2])
                self.report()
        finally:
            self._disconnect_database()

    def keeps_session(self, data: bytes) -> bool:
        """Return True while this node is a member: a deadline follows each document."""
        if not data:
            return False
        new = SignedDocument.unpack(data)
        old, self.signed = self.document, new
        return old.cluster == new.document.cluster and new.document.member(self.cid) is not None

    # -- what the broker says -----------------------------------------------------------------------------------------

    def _take(self, link: BrokerLink, message: Message) -> None:
        """Write a deadline.

        Raises:
            PmgsyncError: when it cannot be written.
        """
        number, epoch, until, fenced = (message.get(key) for key in ("number", "epoch", "until", "fenced"))
        if type(number) is not int or type(epoch) is not int or type(until) is not float or type(fenced) is not bool:
            raise ProtocolError("a lease has no number, epoch, deadline or fence")
        self._fence.want(epoch, fenced=fenced)
        self._held_back = None
        if until > 0 and not self._may_open(epoch):
            until, self._held_back = 0.0, message
        self._session().renew(until)
        self.recovered()
        self._tell(link, number, is_open=until > 0)

    def _forget_told(self) -> None:
        self._told = self._held_back = None

    def _tell(self, link: BrokerLink, number: int, *, is_open: bool) -> None:
        guarded = self._fence.is_as_wanted
        self._told = (number, guarded, is_open)
        link.send({"op": "lease.told", "number": number, "guarded": guarded, "open": is_open, "reign": self._passed})

    def _may_open(self, epoch: int) -> bool:
        """Say whether this database may be opened in an epoch: its sequences were passed for it."""
        reign = reign_began(self.document)
        if self.document.epoch != epoch:
            return False
        if reign > self._passed:
            self._passed = self._session().reign()
        return reign <= self._passed and self._hold.await_opening(self.document)

    def _shut(self, link: BrokerLink, request: int) -> None:
        try:
            closed = self._session().shut()
        except PmgsyncError as error:
            link.send(error_map(request, error))
            if isinstance(error, UnreachableError):
                raise
            return
        log.info("action=lease-shut closed=%s", closed)
        link.send({"op": "done", "id": request, "result": {"closed": closed}})

    # -- the database -------------------------------------------------------------------------------------------------

    def _session(self) -> LeaseSession:
        if self._database is None:
            self._database = LeaseSession(self.config.dsn)
        return self._database

    def _disconnect_database(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
