"""The master's side of a switchover: it closes its tables, and says where its chain ends then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from broker.chains.chains import Chains
from broker.leadership.lease import LeaseKeeper
from broker.members.calls import Attachments, End, Send
from broker.members.members import Members
from pmgsync.core.document import ClusterDocument
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from, error_map

log = logging.getLogger(__name__)

NEAR_BYTES = 1 << 20
"""Bytes of WAL that a candidate may be behind when the master closes."""
WHOLE_S = 3.0
"""For so long the closed master waits until its chain has everything that was committed."""


@dataclass
class _Under:
    """A handover that is under way.

    Attributes:
        barrier: LSN below which everything lies that was committed; None: not known yet.
    """

    cid: int
    send: Send
    request: int
    barrier: int | None = None
    deadline: float = 0.0


class Handover:
    """Closes this node, the master, for a member that is to be it."""

    def __init__(
        self,
        cid: int,
        chains: Chains,
        members: Members,
        lease: LeaseKeeper,
        *,
        document: Callable[[], ClusterDocument],
        leads: Callable[[], bool],
        ask_agent: Callable[[End, str], None],
    ) -> None:
        """Begin.

        Args:
            document: returns the cluster document in force.
            leads: says whether this node acts as master.
            ask_agent: has this node's agent answer a call; raises UnreachableError when it cannot.
        """
        self._cid = cid
        self._chains = chains
        self._members = members
        self._lease = lease
        self._document = document
        self._leads = leads
        self._ask_agent = ask_agent
        self._under: _Under | None = None
        self._heir = 0

    @property
    def is_under_way(self) -> bool:
        """True until the candidate is answered."""
        return self._under is not None

    def ask(self, cid: int, send: Send, request: int, epoch: int) -> None:
        """Hand over to a member; it is answered when the tables are closed.

        Raises:
            MembershipError: when it cannot be master, or this node is not.
            UnreachableError: when it is too far behind, or this node hands over to another.
        """
        document = self._document()
        if not self._leads() or epoch != document.epoch:
            raise MembershipError(f"CID {self._cid} is not the master of epoch {epoch} any more")
        candidate = document.member(cid)
        if candidate is None or not candidate.may_be_master:
            raise MembershipError(f"CID {cid} cannot be master")
        if self._heir not in {0, cid} and (self._under is not None or self._lease.is_released):
            raise UnreachableError(f"the master hands over to node {self._heir} at the moment")
        behind = self._behind(cid)
        if behind is None or behind > NEAR_BYTES:
            raise UnreachableError(f"{candidate.name} is too far behind for the master to close its tables now")
        if self._under is not None:
            # Asked again, before it was answered.
            self._under.send, self._under.request = send, request
            return
        log.info("action=handover cid=%d", cid)
        self._under, self._heir = _Under(cid, send, request), cid
        self._lease.release(self._released)

    def cancel(self, cid: int) -> None:
        """Go on as master: the member for which the tables were closed will not be it."""
        if cid != self._heir:
            return
        self._heir = 0
        log.warning("action=handover-cancelled cid=%d", cid)
        self._under = None
        self._lease.take_up()

    def _behind(self, cid: int) -> int | None:
        head, applied = self._chains.heads().get(self._cid), self._members.acked(cid).get(self._cid)
        if head is None or applied is None or applied.incarnation != head.incarnation:
            return None
        return max(0, head.complete.lsn - applied.position.lsn)

    def _released(self, error: PmgsyncError | None) -> None:
        under = self._under
        if under is None:
            if error is None:
                self._lease.take_up()
            return
        if error is not None:
            self._fail(error)
            return
        try:
            self._ask_agent(End("handover", self._has_barrier, 0), "barrier")
        except PmgsyncError as failed:
            self._fail(failed)

    def _has_barrier(self, message: Mapping[str, Any], _: Attachments) -> bool:
        under = self._under
        if under is None:
            return True
        if message["op"] == "error":
            self._fail(error_from(dict(message)))
        elif message["op"] == "done":
            under.barrier = int(message["result"]["lsn"])
            under.deadline = time.monotonic() + WHOLE_S
            self.tick()
        return True

    def tick(self) -> None:
        """Answer when the chain has everything."""
        under = self._under
        if under is None or under.barrier is None:
            return
        if not self._lease.is_released:
            self._fail(UnreachableError("the master has taken up again meanwhile"))
            return
        own, head = self._chains.own.chain, self._chains.heads().get(self._cid)
        if own is not None and head is not None and max(own.watermark, head.complete.lsn) >= under.barrier:
            self._under = None
            # Nobody took over: it is taken up again a lease after this.
            self._lease.release(lambda error: self._answer(under, own.incarnation, head.complete.lsn, error))
        elif time.monotonic() > under.deadline:
            self._fail(UnreachableError("capture did not come to the end of what was committed in time"))

    def _answer(self, under: _Under, incarnation: int, lsn: int, error: PmgsyncError | None) -> None:
        if error is not None:
            under.send(error_map(under.request, error), ())
            return
        result = {"incarnation": incarnation, "lsn": lsn, "barrier": under.barrier}
        message: Message = {"op": "done", "id": under.request, "result": result}
        if not under.send(message, ()):
            self._lease.take_up()

    def _fail(self, error: PmgsyncError) -> None:
        under, self._under, self._heir = self._under, None, 0
        log.warning("action=handover-failed error=%s", error)
        self._lease.take_up()
        if under is not None:
            under.send(error_map(under.request, error), ())
