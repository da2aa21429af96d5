"""The other members: a link to each, what was last heard of each, and what each has acknowledged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import zmq

from broker.heartbeats.heartbeat import Applied, Heartbeat, HeldChain, OwnChain
from broker.members.calls import Attachments
from broker.members.link import MemberLink, Receiver
from broker.net.keys import NodeKeys
from broker.net.log_limit import LogLimit
from broker.net.loop import Loop, Socket
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.synchronous import Said
from pmgsync.errors import PmgsyncError, UnknownChainError, UnreachableError

log = logging.getLogger(__name__)

MAX_REMEMBERED = 100
"""Refusals that were logged already."""


class Members:
    """Links and acks of all members but this node, by CID.

    Attributes:
        on_acknowledged: called with the CID of a member whose ack has come.
    """

    def __init__(self, context: zmq.Context[Socket], loop: Loop, keys: NodeKeys, cid: int) -> None:
        self._context = context
        self._loop = loop
        self._keys = keys
        self._cid = cid
        self._links: dict[int, MemberLink] = {}
        self._acked: dict[int, dict[int, Applied]] = {}
        self._words: dict[int, tuple[int, int, Mapping[int, Applied]]] = {}
        self.on_acknowledged: Callable[[int], None] = lambda cid: None
        self._logged: list[str] = []
        self._limit = LogLimit(time.monotonic)
        self._cids: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[MemberLink]:
        return iter(list(self._links.values()))

    def link(self, cid: int) -> MemberLink | None:
        """Return the link to a member, None when it is not one."""
        return self._links.get(cid)

    def meet(self, document: ClusterDocument, receiver: Receiver) -> None:
        """Connect to the members that are new in a document, and end the links to those that are gone or changed."""
        self._cids = document.cids
        for link in self:
            if document.member(link.member.cid) != link.member:
                receiver.connection_lost(link)
                self._drop(link)
        for member in document.members:
            if member.cid not in self._links and member.cid != self._cid:
                self._links[member.cid] = MemberLink(self._context, self._loop, self._keys, member, receiver)

    def renew(self, receiver: Receiver) -> None:
        """End all links, for this node has other keys; `meet` makes new ones."""
        for link in self:
            receiver.connection_lost(link)
            self._drop(link)

    def close(self) -> None:
        """End all links."""
        for link in self:
            self._drop(link)

    def _drop(self, link: MemberLink) -> None:
        cid = link.member.cid
        link.close()
        del self._links[cid]
        self._acked.pop(cid, None)
        self._words.pop(cid, None)

    # -- what they have said ------------------------------------------------------------------------------------------

    def heard(self, link: MemberLink, heartbeat: Heartbeat) -> None:
        """Note a heartbeat."""
        link.heard(heartbeat)
        self._note(heartbeat.cid, heartbeat.applied)

    def acknowledge(self, cid: int, applied: Mapping[int, Applied], epoch: int, master: int) -> None:
        """Take an ack.

        Args:
            epoch, master: whom the member follows; 0 when not told.
        """
        self._note(cid, applied)
        self._words[cid] = (epoch, master, applied)
        self.on_acknowledged(cid)

    def _note(self, cid: int, applied: Mapping[int, Applied]) -> None:
        known = self._acked.get(cid, {})
        # A broker that has just begun does not say all at once. Of nodes that were removed only the newest word counts.
        kept = {origin: done for origin, done in known.items() if origin in self._cids}
        self._acked[cid] = kept | dict(applied)

    def acked(self, cid: int) -> Mapping[int, Applied]:
        """Return how far a member has applied chains, by origin."""
        return self._acked.get(cid, {})

    def said(self, cid: int, origin: int) -> Said | None:
        """Return what a member's newest ack has of a chain, None when nothing."""
        epoch, master, applied = self._words.get(cid, (0, 0, {}))
        done = applied.get(origin)
        if done is None:
            return None
        return Said(epoch, master, done.incarnation, done.position, done.visible, done.whole)

    def own_chain(self, cid: int) -> OwnChain | None:
        """Return what a member last said of its own chain."""
        link = self._links.get(cid)
        return link.heartbeat.own if link and link.heartbeat else None

    def up(self, cid: int) -> bool:
        """Return True while heartbeats of a member come."""
        link = self._links.get(cid)
        return link is not None and link.up

    def holding(self, origin: int, incarnation: int) -> dict[int, HeldChain]:
        """Return the members that are up and hold an incarnation of a chain, and what they hold of it."""
        return {
            link.member.cid: chain
            for link in self
            if link.up
            and link.heartbeat is not None
            and (chain := link.heartbeat.chains.get(origin)) is not None
            and chain.incarnation == incarnation
        }

    def refuse(self, cid: int, error: PmgsyncError) -> None:
        """Have status show why something that a member sent was refused, and log each reason once."""
        link = self._links.get(cid)
        # It is no fault of a member when it asks for what is not available now.
        if link is not None and not isinstance(error, UnreachableError | UnknownChainError):
            link.refuse(str(error))
        text = f"node {cid}: {error}"
        if text not in self._logged and self._limit.take():
            if count := self._limit.left_out():
                log.warning("action=refused-more count=%d", count)
            log.warning("action=refused %s", text)
            self._logged = [*self._logged[-MAX_REMEMBERED + 1 :], text]

    # -- what is said to them -----------------------------------------------------------------------------------------

    def send(self, cid: int, message: Mapping[str, Any], attachments: Attachments = ()) -> bool:
        """Send a control message; False when the member is not connected."""
        link = self._links.get(cid)
        return link is not None and link.send(message, attachments)

    def send_all(self, message: Mapping[str, Any]) -> None:
        """Send a control message to every member that is connected."""
        for link in self:
            link.send(message)

    def tick(self) -> None:
        """Check the time-outs of every link."""
        for link in self:
            link.tick()


def peer(cid: int) -> tuple[str, int]:
    """Return the owner that stands for a member in the tables of calls and streams."""
    return ("peer", cid)
