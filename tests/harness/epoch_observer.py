"""The members of an `epoch_world`, and what must hold of all of them at every instant."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Candidacy, Record
from pmgsync.core.lease import Lease, Promise, Request
from pmgsync.core.membership import SignedDocument, accept_document
from pmgsync.core.votes import Ballot


class Violation(AssertionError):  # noqa: N818
    """Something that must never be was seen."""


@dataclass
class Message:
    """On its way from one member to another."""

    source: int
    target: int
    kind: str
    content: tuple[Any, ...]


@dataclass
class Database:
    """What stands in a member's database, and goes on counting whatever becomes of those who tend it.

    Attributes:
        until: by the member's clock; -inf: closed.
        document: that its master went by when it was written.
    """

    until: float = -math.inf
    document: ClusterDocument | None = None


@dataclass
class Node:
    """A member: its disk (`held`, `record`), its database, and a memory that a crash takes away."""

    cid: int
    held: SignedDocument
    rate: float = 1.0
    offset: float = 0.0
    record: Record = field(default_factory=Record)
    database: Database = field(default_factory=Database)
    up: bool = False
    run: int = 0
    number: int = 0
    promise: Promise = field(default_factory=lambda: Promise(0, -math.inf))
    lease: Lease = field(default_factory=lambda: Lease(0, 0))
    sent: dict[Request, float] = field(default_factory=dict)
    holding: dict[int, tuple[int, int]] = field(default_factory=dict)
    candidacy: Candidacy | None = None
    heard: int = 0

    @property
    def document(self) -> ClusterDocument:
        return self.held.document


class Observer:
    """Sees what everybody does, remembers it, and objects (`Violation`) to what must never be."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.nodes: dict[int, Node] = {}
        self.parents: dict[bytes, frozenset[bytes]] = {}
        self.settled: dict[bytes, ClusterDocument] = {}
        self.epochs: dict[bytes, ClusterDocument] = {}
        self.votes_seen: dict[tuple[int, int], Ballot] = {}
        self.names: dict[int, str] = {}
        self.first: SignedDocument | None = None
        self.strict = False

    def clock(self, node: Node) -> float:
        """Return what a member's clock says."""
        return node.offset + self.now * node.rate

    def is_open(self, node: Node) -> bool:
        """True when the member's database takes writes to the master's tables."""
        return node.database.until > self.clock(node)

    def see_vote(self, voter: int, ballot: Ballot) -> None:
        if self.votes_seen.setdefault((voter, ballot.epoch), ballot) != ballot:
            raise Violation(f"{voter} votes twice in epoch {ballot.epoch}")

    def see_taken(self, node: Node, old: ClusterDocument, offered: SignedDocument) -> None:
        new = offered.document
        if new.epoch < old.epoch:
            raise Violation(f"{node.cid} goes from epoch {old.epoch} to {new.epoch}")
        mine, theirs = _tails(old, new)
        if mine and not any(entry.forced for entry in mine) and any(entry.forced for entry in theirs):
            raise Violation(f"{node.cid} lets a forced epoch replace one that was voted for")
        assert self.first is not None
        if offered.body != self.first.body and not accept_document(self.first.document, offered):
            raise Violation("a document that was taken cannot be checked by somebody who has the first one alone")

    def see_epoch(self, node: Node, signed: SignedDocument) -> None:
        new = signed.document
        for writer in self.nodes.values():
            old = writer.database.document
            if writer is node or not self.is_open(writer) or old is None or old.fence == "none":
                continue
            if not any(entry.forced for tail in _tails(old, new) for entry in tail):
                raise Violation(f"epoch {new.epoch} begins while {writer.cid} still writes")
        for other in self.epochs.values():
            if other.epoch == new.epoch and (other.master != new.master):
                mine, theirs = _tails(other, new)
                if not any(entry.forced for entry in (*mine, *theirs)):
                    raise Violation(f"epoch {new.epoch} has two masters that were voted for")
        self.epochs[signed.body] = new
        for body, document in self.settled.items():
            self._lost(body, document, signed.body, new)

    def see_settled(self, node: Node) -> None:
        self.settled[node.held.body] = node.document
        for body, document in self.epochs.items():
            self._lost(node.held.body, node.document, body, document)

    def _lost(self, settled: bytes, old: ClusterDocument, epoch: bytes, new: ClusterDocument) -> None:
        forced = any(entry.forced for tail in _tails(old, new) for entry in tail)
        if new.epoch > old.epoch and not forced and settled not in self.parents[epoch]:
            raise Violation(f"epoch {new.epoch} has lost document {old.version}, which a majority had acknowledged")

    def check(self) -> None:
        """Look at all databases: of two that are open, one has a master by force, or was never fenced."""
        open_now = [node for node in self.nodes.values() if self.is_open(node)]
        for number, one in enumerate(open_now):
            for other in open_now[number + 1 :]:
                first, second = one.database.document, other.database.document
                assert first is not None
                assert second is not None
                if "none" in {first.fence, second.fence}:
                    continue
                if self.strict or not any(entry.forced for tail in _tails(first, second) for entry in tail):
                    raise Violation(f"{one.cid} and {other.cid} write at one time, in {first.epoch} and {second.epoch}")


def _tails(one: ClusterDocument, other: ClusterDocument) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    common = 0
    for mine, theirs in zip(one.history, other.history, strict=False):
        if mine != theirs:
            break
        common += 1
    return one.history[common:], other.history[common:]
