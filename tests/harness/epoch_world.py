"""A small world of members that elect, lease, fall silent and come back: the rules of `pmgsync.core` under attack.

Nothing here decides anything: every decision is the core's. The world has one true time, a clock of its own rate and
offset for each member, disks that survive crashes, memories that do not, databases that stay open while nobody tends
them, and a network that loses, delays, repeats and reorders. After each event it checks what must hold (`check`).

`faults` names rules to break on purpose; the tests use them to prove that the checks would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Candidacy, Granted, Record, may_acknowledge, may_lead, may_take, may_vote, next_epoch
from pmgsync.core.lease import Lease, Promise, Request, fence_due, is_kept, is_settled
from pmgsync.core.membership import (
    Member,
    SignedDocument,
    accept_document,
    first_document,
    new_epoch,
    sign,
    with_confirmed,
    with_fence,
    with_member,
    without_member,
)
from pmgsync.core.signed import Order, compare
from pmgsync.core.votes import Ballot, Vote
from pmgsync.errors import MembershipError, SplitBrainError

LEASE_MS = 10_000
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(20)]
PUBLIC = [key.public_key().public_bytes_raw() for key in KEYS]


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


class World:
    """Members, the network between them, and what was seen so far."""

    def __init__(self, voters: int, *, witnesses: int = 0, faults: frozenset[str] = frozenset()) -> None:
        """Found a cluster of so many members with a vote, the last ones witnesses, everybody up and well."""
        self.faults = faults
        self.now = 1000.0
        self.network: list[Message] = []
        self.cut: set[frozenset[int]] = set()
        self.log: list[str] = []
        self.parents: dict[bytes, frozenset[bytes]] = {}
        self.settled: dict[bytes, ClusterDocument] = {}
        self.epochs: dict[bytes, ClusterDocument] = {}
        self.votes_seen: dict[tuple[int, int], Ballot] = {}
        self.names: dict[int, str] = {}
        self.runs = 0
        self.strict = False
        document = first_document(b"w" * 16, "world", "mirror", _member(1), fence="lease", lease_ms=LEASE_MS)
        for cid in range(2, voters + 1):
            role = "witness" if cid > voters - witnesses else "node"
            document = with_member(document, replace(_member(cid), role=role))
        if voters < 3:
            document = with_fence(document, "none")
        self.first = self._signed(document, 1, None)
        self.nodes = {cid: Node(cid, self.first) for cid in range(1, voters + 1)}
        for node in self.nodes.values():
            self._start(node, first=True)
        self.tell(
            f"{document.name}: master 1, {voters - witnesses - 1} slaves, {witnesses} witnesses, fence {document.fence}"
        )

    # -- time and the network -----------------------------------------------------------------------------------------

    def clock(self, node: Node) -> float:
        return node.offset + self.now * node.rate

    def set_clock(self, cid: int, rate: float, offset: float = 0.0) -> None:
        """Give a member a clock, before anything has happened."""
        node = self.nodes[cid]
        node.rate, node.offset = rate, offset
        node.promise = Promise(0, -math.inf)

    def tell(self, what: str) -> None:
        self.log.append(f"{self.now - 1000:7.1f} s  {what}")

    def story(self) -> str:
        """Return what happened, one event a line."""
        return "\n".join(self.log)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.check()

    def send(self, node: Node, target: int, kind: str, *content: Any) -> None:
        if kind == "vote":
            self._see_vote(node.cid, content[0])
        self.network.append(Message(node.cid, target, kind, content))

    def send_all(self, node: Node, kind: str, *content: Any) -> None:
        for cid in sorted(node.document.cids - {node.cid}):
            self.send(node, cid, kind, *content)

    def deliver(self, number: int, *, keep: bool = False, crash: bool = False) -> None:
        """Hand a message over; `keep`: it will come again; `crash`: the receiver dies when its disk is written."""
        message = self.network[number]
        if not keep:
            self.network.pop(number)
        node = self.nodes.get(message.target)
        if node is None or not node.up or frozenset((message.source, message.target)) in self.cut:
            return
        handler: Callable[..., None] = getattr(self, f"_on_{message.kind}")
        outgoing = len(self.network)
        handler(node, message.source, *message.content)
        if crash:
            del self.network[outgoing:]
            self.crash(node.cid)
        self.check()

    def lose(self, number: int) -> None:
        self.network.pop(number)

    def pick(self, kind: str, source: int = 0, target: int = 0) -> None:
        """Deliver what is of this kind now, between these two when they are named; the rest stays on its way."""
        chosen = [
            message
            for message in self.network
            if message.kind == kind and source in {0, message.source} and target in {0, message.target}
        ]
        for message in chosen:
            self.deliver(next(number for number, one in enumerate(self.network) if one is message))

    def isolate(self, cid: int) -> None:
        """Cut a member off from all others, and lose what is on its way."""
        self.cut |= {frozenset((cid, other)) for other in self.nodes if other != cid}
        self.network.clear()

    def beat(self, cid: int) -> None:
        """Have a master ask, and everybody answer who hears it."""
        self.request(cid)
        self.pick("request", cid)
        self.pick("ack")

    def settle(self) -> None:
        """Deliver everything there is, and what comes of it."""
        while self.network:
            self.deliver(0)

    # -- what befalls members -----------------------------------------------------------------------------------------

    def crash(self, cid: int, *, machine: bool = False) -> None:
        """End a member's broker; with the machine its database ends too, and comes back closed."""
        node = self.nodes[cid]
        node.up = False
        if machine:
            node.database = Database()
        self.tell(f"{cid} {'loses its machine' if machine else 'is killed'}")

    def restart(self, cid: int) -> None:
        node = self.nodes[cid]
        if not node.up:
            self._start(node)
            self.tell(f"{cid} starts again, in epoch {node.document.epoch}")

    def _start(self, node: Node, *, first: bool = False) -> None:
        self.runs += 1
        now = self.clock(node)
        wait = -LEASE_MS / 1000 if first or "no wait after restart" in self.faults else LEASE_MS / 1000
        node.up, node.run, node.number, node.sent, node.holding = True, self.runs, 0, {}, {}
        node.promise = Promise.after_restart(now + wait - LEASE_MS / 1000, LEASE_MS / 1000, node.record.promised)
        node.lease = Lease(node.document.epoch, node.cid)
        node.candidacy, node.heard = None, 0

    # -- the master ---------------------------------------------------------------------------------------------------

    def is_master(self, node: Node) -> bool:
        return node.document.master == node.cid

    def _leads(self, node: Node) -> bool:
        record = Record() if "leads after voting" in self.faults else node.record
        return may_lead(node.cid, node.document, record)

    def request(self, cid: int) -> None:
        """Have a master ask for acknowledgements, as its heartbeats do."""
        node = self.nodes[cid]
        if not node.up or not self._leads(node):
            return
        if node.promise.binds_against(cid, self.clock(node)):
            return
        node.record = replace(node.record, promised=cid)
        if node.promise.master != cid:
            node.promise = Promise(cid, -math.inf)
        node.number += 1
        request = Request(node.run, node.number)
        node.sent[request] = self.clock(node)
        self.send_all(node, "request", node.document.epoch, request)
        self._write_lease(node)

    def _on_request(self, node: Node, source: int, epoch: int, request: Request) -> None:
        if node.cid == node.document.master and source != node.cid and epoch <= node.document.epoch:
            return
        record, now = node.record, self.clock(node)
        if "acknowledges after voting" in self.faults:
            record = Record(0, None, record.promised)
        promise = self._promise(node)
        if "promises to all" in self.faults:
            promise = replace(promise, master=source)
        answer = may_acknowledge(node.document, record, promise, epoch, source, now)
        if not isinstance(answer, Granted):
            self.send(node, source, "refused", answer.epoch, node.held if answer.documents_differ else None)
            return
        if "acknowledges after voting" not in self.faults:
            node.record = answer.record
        node.promise = node.promise.given(source, request, now, LEASE_MS / 1000)
        self.send(node, source, "ack", epoch, request, node.document.version)

    def _on_ack(self, node: Node, source: int, epoch: int, request: Request, version: tuple[int, int]) -> None:
        if epoch != node.lease.epoch or not self.is_master(node) or request not in node.sent:
            return
        sent = self.clock(node) if "lease from receipt" in self.faults else node.sent[request]
        node.lease = node.lease.acknowledged(source, sent)
        if version[0] == epoch:
            node.holding[source] = max(version, node.holding.get(source, (0, 0)))
        if is_settled(node.document, node.holding):
            self._see_settled(node)
        self._admit(node)
        self._write_lease(node)

    def _write_lease(self, node: Node) -> None:
        if not self._leads(node):
            return
        until = node.lease.until(node.document)
        if "counts everybody" in self.faults and node.lease.sent:
            until = max(node.lease.sent.values()) + LEASE_MS / 1000 * 0.9
        if "no margin" in self.faults and not math.isinf(until):
            until += LEASE_MS / 1000 * 0.1
        was = self.is_open(node)
        if until > -math.inf:
            node.database = Database(until, node.document)
            node.lease = node.lease.tell(until)
        if self.is_open(node) and not was:
            self.tell(f"{node.cid} opens its tables in epoch {node.document.epoch}")

    def is_open(self, node: Node) -> bool:
        return node.database.until > self.clock(node)

    def hand_over(self, cid: int) -> None:
        """Have a master close its database and let its lease go."""
        node = self.nodes[cid]
        if not node.up or not self.is_master(node) or node.lease.closing or node.lease.epoch != node.document.epoch:
            return
        node.database = Database()
        node.lease = node.lease.released()
        self.tell(f"{cid} closes its tables and lets go")
        self.send_all(node, "release", Request(node.run, node.number))

    def take_up(self, cid: int) -> None:
        """Have a master that had let go go on, since nobody took over."""
        node = self.nodes[cid]
        if node.up and self.is_master(node) and node.lease.closing:
            node.lease = node.lease.taken_up(self.clock(node))
            self.tell(f"{cid} goes on as master")

    def _on_release(self, node: Node, source: int, request: Request) -> None:
        if "late release" in self.faults and source == node.promise.master:
            request = Request(request.run if node.promise.request is None else node.promise.request.run, 10**9)
        node.promise = node.promise.released(source, request, self.clock(node))

    def close(self, cid: int) -> None:
        """Have the agent of a member that is not master (any more) close its database, and the broker hear of it."""
        node = self.nodes[cid]
        if node.up and not self.is_master(node):
            node.database = Database()
            if node.promise.master == cid:
                node.promise = replace(node.promise, until=-math.inf)

    # -- documents ----------------------------------------------------------------------------------------------------

    def _signed(self, document: ClusterDocument, cid: int, after: SignedDocument | None) -> SignedDocument:
        signed = sign(document, cid, KEYS[cid - 1], after=after)
        known = frozenset() if after is None else self.parents[after.body] | {after.body}
        self.parents[signed.body] = known
        return signed

    def _admit(self, node: Node) -> None:
        """Tell newcomers their CIDs, when the document that they are in is kept."""
        kept = is_kept(node.document, node.holding) or "admits at once" in self.faults
        if not self._leads(node) or not kept:
            return
        for member in node.document.members:
            if self.names.setdefault(member.cid, member.name) != member.name:
                raise Violation(f"CID {member.cid} was given out twice")
            if member.cid not in self.nodes:
                self.nodes[member.cid] = Node(member.cid, node.held)
                self._start(self.nodes[member.cid])

    def spread(self, cid: int) -> None:
        node = self.nodes[cid]
        if node.up:
            self.send_all(node, "document", node.held)

    def _on_document(self, node: Node, source: int, offered: SignedDocument) -> None:
        held, record = node.document, Record() if "takes what its vote does not know" in self.faults else node.record
        try:
            taken = may_take(held, record, offered)
        except SplitBrainError as error:
            self.tell(f"{node.cid} and {source} see that they are split: {error.message}")
            return
        except MembershipError:
            if not any(entry.forced for one in (held, offered.document) for entry in one.history):
                raise
            return
        if "forced is as good" in self.faults and not taken:
            taken = offered.document.epoch == held.epoch and offered.document.serial > held.serial
        if taken:
            self._take(node, offered)
            self.tell(f"{node.cid} takes document {_version(offered)} from {source}")
        elif compare(offered.document, held) is Order.NEWER:
            self.send(node, source, "document", node.held)

    def _take(self, node: Node, offered: SignedDocument) -> None:
        old, new = node.document, offered.document
        self._see_taken(node, old, offered)
        if "forgets its lease" not in self.faults:
            node.promise = self._promise(node)
        node.held = offered
        if new.epoch != old.epoch or new.master != old.master:
            node.lease, node.holding, node.sent = Lease(new.epoch, node.cid), {}, {}

    def change(self, cid: int, what: str = "touch", which: int = 0) -> None:
        """Have a master change the document: `touch`, `join` a newcomer, `confirm` it, or `delete` a member."""
        node = self.nodes[cid]
        if not node.up or not self._leads(node):
            return
        document, allowed = node.document, is_kept(node.document, node.holding)
        if "members change at once" in self.faults:
            allowed = True
        if what == "touch":
            changed = replace(document, serial=document.serial + 1)
        elif what == "fence":
            due = fence_due(document, "lease", node.holding)
            if due is None:
                return
            changed = with_fence(document, due)
        elif not allowed or document.forced:
            return
        elif what == "join":
            if document.max_cid >= 9:
                return
            cid_new = document.max_cid + 1
            newcomer = replace(_member(cid_new, by=node.cid), state="joining")
            changed = with_member(document, newcomer)
        else:
            members = sorted(document.cids - {cid})
            if not members:
                return
            chosen = members[which % len(members)]
            changed = with_confirmed(document, chosen) if what == "confirm" else without_member(document, chosen)
            if changed is document or (what == "delete" and len(changed.voters) < 3):
                return
        node.held = self._signed(changed, cid, node.held)
        self._admit(node)
        if what != "touch":
            self.tell(f"{cid} changes who is a member: {sorted(changed.voters)} vote, document {_version(node.held)}")
        self.send_all(node, "document", node.held)

    # -- promotion ----------------------------------------------------------------------------------------------------

    def _promise(self, node: Node) -> Promise:
        """Return what binds a member, its own lease included."""
        return node.lease.binding(node.promise, node.document, self.clock(node))

    def stand(self, cid: int) -> None:
        """Have a member ask for votes."""
        node = self.nodes[cid]
        member = node.document.member(cid)
        if not node.up or member is None or not member.may_be_master:
            return
        epoch = next_epoch(node.document, node.record, node.heard)
        node.candidacy = Candidacy.of(node.held, cid, epoch)
        self.tell(f"{cid} stands for epoch {epoch}")
        if node.candidacy.lacks_own() or "a minority is enough" in self.faults:
            self._vote(node, cid, node.candidacy.ballot)
        self.send_all(node, "ask", node.candidacy.ballot, node.held)

    def _on_ask(self, node: Node, source: int, ballot: Ballot, held: SignedDocument) -> None:
        self._on_document(node, source, held)
        self._vote(node, source, ballot)

    def _vote(self, node: Node, candidate: int, ballot: Ballot) -> None:
        record = Record() if "votes twice" in self.faults else node.record
        promise = self._promise(node)
        if "breaks its promise" in self.faults:
            promise = Promise(0, -math.inf)
        answer = may_vote(node.cid, node.held, record, promise, ballot, self.clock(node))
        if not isinstance(answer, Granted):
            self.tell(f"{node.cid} does not vote for {candidate}: {answer.reason}")
            self.send(node, candidate, "refused", answer.epoch, node.held if answer.documents_differ else None)
            return
        if "sends before it writes" not in self.faults:
            node.record = answer.record
        vote = ballot.sign(node.cid, KEYS[node.cid - 1])
        if node.cid == candidate:
            self._see_vote(node.cid, ballot)
            self._on_vote(node, node.cid, ballot, vote)
        else:
            self.tell(f"{node.cid} votes for {candidate} in epoch {ballot.epoch}")
            self.send(node, candidate, "vote", ballot, vote)

    def _on_refused(self, node: Node, source: int, epoch: int, held: SignedDocument | None) -> None:
        node.heard = max(node.heard, epoch)
        if held is not None:
            self._on_document(node, source, held)

    def _on_vote(self, node: Node, source: int, ballot: Ballot, vote: Vote) -> None:
        if node.candidacy is None or node.candidacy.ballot != ballot:
            return
        node.candidacy = node.candidacy.with_vote(vote)
        if node.candidacy.lacks_own():
            self._vote(node, node.cid, ballot)
            return
        won = node.candidacy.is_won(node.held, node.record)
        if "a minority is enough" in self.faults:
            won = len(node.candidacy.votes) >= node.document.majority - 1 and node.record.ballot == ballot
        if won:
            document = node.candidacy.document(fork=None, start=None, when=int(self.now), reason="voted")
            signed = self._signed(document, node.cid, node.held)
            voters = sorted(node.candidacy.votes)
            node.candidacy = None
            self._take(node, signed)
            self._see_epoch(node, signed)
            self.tell(f"{node.cid} is master of epoch {document.epoch}, by the votes of {voters}")
            self.send_all(node, "document", node.held)

    def force(self, cid: int) -> None:
        """Have an administrator make a member master without asking anybody."""
        node = self.nodes[cid]
        member = node.document.member(cid)
        if not node.up or member is None or not member.may_be_master or self.is_master(node):
            return
        document = new_epoch(
            node.document,
            cid,
            epoch=next_epoch(node.document, node.record, node.heard),
            fork=None,
            when=int(self.now),
            reason="forced",
            forced=True,
        )
        self._take(node, self._signed(document, cid, node.held))
        self.tell(f"{cid} is made master of epoch {document.epoch} by force")
        self.send_all(node, "document", node.held)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _see_vote(self, voter: int, ballot: Ballot) -> None:
        if self.votes_seen.setdefault((voter, ballot.epoch), ballot) != ballot:
            raise Violation(f"{voter} votes twice in epoch {ballot.epoch}")

    def _see_taken(self, node: Node, old: ClusterDocument, offered: SignedDocument) -> None:
        new = offered.document
        if new.epoch < old.epoch:
            raise Violation(f"{node.cid} goes from epoch {old.epoch} to {new.epoch}")
        mine, theirs = _tails(old, new)
        if mine and not any(entry.forced for entry in mine) and any(entry.forced for entry in theirs):
            raise Violation(f"{node.cid} lets a forced epoch replace one that was voted for")
        if offered.body != self.first.body and not accept_document(self.first.document, offered):
            raise Violation("a document that was taken cannot be checked by somebody who has the first one alone")

    def _see_epoch(self, node: Node, signed: SignedDocument) -> None:
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

    def _see_settled(self, node: Node) -> None:
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


def _version(signed: SignedDocument) -> str:
    return "{}.{}".format(*signed.document.version)


def _member(cid: int, by: int = 0) -> Member:
    # One whom two masters take in at once under one CID is told apart by its name.
    name, key = f"node{cid}-{by}", bytes([cid, by]) * 16
    return Member(cid, name, f"192.0.2.{cid}", 7670, 7671, 7672, key, PUBLIC[cid - 1])
