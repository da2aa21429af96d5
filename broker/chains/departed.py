"""The chains of nodes that were removed from the cluster: applied to their ends everywhere, then forgotten.

A worker of the agent applies such a chain as before, from the journals that the members have. What says that a database
is done with it is a row there, so it survives whatever ends this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.chains.chains import Chains
from broker.chains.endings import Ending, Standing, Verdict, judge_ending
from broker.heartbeats.heartbeat import Heartbeat, HeldChain
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.stretches import Stretch
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError

log = logging.getLogger(__name__)

ASKED_AGAIN_S = 2.0
"""So often the worker is told that a chain is over, until its database says so."""
SHOWN_AFTER_S = 10.0
"""Status says what such a chain waits for when it has been waiting for so long."""


class Departed:
    """Knows these chains, tells the agent what is to be done about them, and forgets them.

    Attributes:
        over: the origins whose chains this database is done with, while others may still ask for that.
    """

    def __init__(
        self,
        cid: int,
        chains: Chains,
        members: Members,
        divergence: DivergenceFiles,
        *,
        document: Callable[[], ClusterDocument],
        tell: Callable[[int, Mapping[str, Any]], None],
        changed: Callable[[], None],
    ) -> None:
        """Begin.

        Args:
            document: returns the cluster document in force.
            tell: sends a message to the worker that applies an origin's chain, if there is one.
            changed: is called when `origins` has changed.
        """
        self._cid = cid
        self._chains = chains
        self._members = members
        self._divergence = divergence
        self._document = document
        self._tell = tell
        self._changed = changed
        self._asked: dict[int, float] = {}
        self._waiting: dict[int, tuple[float, str]] = {}
        self._origins: list[int] = []
        self.over: set[int] = set()

    @property
    def origins(self) -> list[int]:
        """The nodes that were removed and whose chains are not over here."""
        return self._origins

    def follow_document(self) -> None:
        """Take over who was removed, before the agent is told of the document."""
        self._origins = self._found(self._document())

    def alerts(self) -> list[dict[str, str]]:
        """Return what an administrator should know of chains that cannot be forgotten yet."""
        since = time.monotonic() - SHOWN_AFTER_S
        return [
            {"kind": "removed", "text": f"what is kept of node {origin}, which was removed, is still needed: {reason}"}
            for origin, (begun, reason) in sorted(self._waiting.items())
            if begun < since
        ]

    def done(self, origin: int) -> None:
        """Forget a chain: this node's database is done with it."""
        if self._document().member(origin) is not None:
            return
        if origin not in self.over:
            log.info("action=chain-over origin=%d", origin)
        self.over.add(origin)
        self._chains.forget(origin)
        self._look()

    def tick(self) -> None:
        """See which chains are over."""
        self._look()
        document = self._document()
        for origin in self._origins:
            verdict = self._judge(document, origin)
            if verdict.ending is Ending.WAITS:
                begun, _ = self._waiting.get(origin, (time.monotonic(), ""))
                self._waiting[origin] = begun, verdict.reason
            elif document.is_witness(self._cid):
                self.done(origin)
            elif time.monotonic() >= self._asked.get(origin, 0.0):
                self._asked[origin] = time.monotonic() + ASKED_AGAIN_S
                lost = verdict.ending is Ending.LOST
                if lost:
                    log.warning("action=chain-lost origin=%d reason=%s", origin, verdict.reason)
                self._tell(origin, {"op": "chain.over", "origin": origin, "lost": lost})

    def _look(self) -> None:
        document = self._document()
        found = self._found(document)
        self._waiting = {origin: told for origin, told in self._waiting.items() if origin in found}
        self._asked = {origin: at for origin, at in self._asked.items() if origin in found}
        if found != self._origins:
            self._origins = found
            self._changed()
        self._chains.forget_strangers({*document.cids, *found})
        self.over &= self._held_elsewhere()

    def _found(self, document: ClusterDocument) -> list[int]:
        held = set(self._chains.heads())
        for link in self._members:
            heartbeat = link.heartbeat
            # Of another document it may be a node that is not known here yet.
            if heartbeat is not None and link.up and _agrees(heartbeat, document, exactly=True):
                held |= heartbeat.chains.keys()
        gone = {origin for origin in held - document.cids if origin <= document.max_cid}
        return sorted(gone - self.over)

    def _held_elsewhere(self) -> set[int]:
        heartbeats = [link.heartbeat for link in self._members if link.heartbeat is not None]
        return {origin for heartbeat in heartbeats for origin in heartbeat.chains}

    def _judge(self, document: ClusterDocument, origin: int) -> Verdict:
        if any(stretch.origin == origin for stretch in self._pending()):
            return Verdict(Ending.WAITS, "what does not count of it is to be exported first")
        head = self._chains.heads().get(origin)
        own = None if head is None else HeldChain(head.incarnation, self._chains.journals.first(origin), head.position)
        standings = {self._cid: Standing(True, own, self._chains.applied.get(origin), origin in self.over)}
        for link in self._members:
            heartbeat, cid = link.heartbeat, link.member.cid
            if heartbeat is None or not link.up or not _agrees(heartbeat, document):
                standings[cid] = Standing(False)
                continue
            applied = self._members.acked(cid).get(origin)
            standings[cid] = Standing(True, heartbeat.chains.get(origin), applied, origin in heartbeat.over)
        return judge_ending(
            self._cid,
            standings,
            master=document.master,
            databases=with_databases(document),
            complete=head.complete if head is not None else None,
        )

    def _pending(self) -> Sequence[Stretch]:
        try:
            return self._divergence.pending()
        except PmgsyncError:
            return []  # status says so


def with_databases(document: ClusterDocument) -> frozenset[int]:
    """Return the members that have a database, or are copying it."""
    return frozenset(member.cid for member in document.members if member.role != "witness")


def _agrees(heartbeat: Heartbeat, document: ClusterDocument, *, exactly: bool = False) -> bool:
    """Return True when a member follows this document, or a later one of the same epoch."""
    same = (heartbeat.epoch, heartbeat.master) == (document.epoch, document.master)
    return same and (heartbeat.serial == document.serial if exactly else heartbeat.serial >= document.serial)
