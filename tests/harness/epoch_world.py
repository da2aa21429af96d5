"""A small world of members that elect, lease, fall silent and come back: the rules of `pmgsync.core` under attack.

Nothing here decides anything: every decision is the core's. The world has one true time, a clock of its own rate and
offset for each member, disks that survive crashes, memories that do not, databases that stay open while nobody tends
them, and a network that loses, delays, repeats and reorders. After each event it checks what must hold (`check`).

`faults` names rules to break on purpose; the tests use them to prove that the checks would notice.
"""

# Longer than a module should be, and its class too: one simulated world whose rules depend on each other.
from __future__ import annotations

import math
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Candidacy, Granted, Record, may_acknowledge, may_lead, may_take, may_vote, next_epoch
from pmgsync.core.lease import Lease, Promise, Request, fence_due, is_kept, is_settled
from pmgsync.core.membership import (
    Member,
    SignedDocument,
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
from tests.harness.epoch_network import Network
from tests.harness.epoch_observer import Database, Node, Violation

LEASE_MS = 10_000
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(20)]
PUBLIC = [key.public_key().public_bytes_raw() for key in KEYS]


# Over 250 lines: it plays the whole broker, one short method an event.
class World(Network):
    """Members, the network between them, and what was seen so far."""

    def __init__(self, voters: int, *, witnesses: int = 0, faults: frozenset[str] = frozenset()) -> None:
        """Found a cluster of so many members with a vote, the last ones witnesses, everybody up and well."""
        super().__init__()
        self.faults = faults
        self.runs = 0
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

    # -- what befalls members -----------------------------------------------------------------------------------------

    def crash(self, cid: int, *, machine: bool = False) -> None:
        """End a member's broker; with the machine its database ends too, and comes back closed."""
        node = self.nodes[cid]
        node.up = False
        if machine:
            node.database = Database()
        self.tell(f"{cid} {'loses its machine' if machine else 'is killed'}")

    def beat(self, cid: int) -> None:
        """Have a master ask, and everybody answer who hears it."""
        self.request(cid)
        self.pick("request", cid)
        self.pick("ack")

    def set_clock(self, cid: int, rate: float, offset: float = 0.0) -> None:
        """Give a member a clock, before anything has happened."""
        node = self.nodes[cid]
        node.rate, node.offset = rate, offset
        node.promise = Promise(0, -math.inf)

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
            self.see_settled(node)
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
        self.see_taken(node, old, offered)
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
            self.see_vote(node.cid, ballot)
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
            self.see_epoch(node, signed)
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


def _version(signed: SignedDocument) -> str:
    return "{}.{}".format(*signed.document.version)


def _member(cid: int, by: int = 0) -> Member:
    # One whom two masters take in at once under one CID is told apart by its name.
    name, key = f"node{cid}-{by}", bytes([cid, by]) * 16
    return Member(cid, name, f"192.0.2.{cid}", 7670, 7671, 7672, key, PUBLIC[cid - 1])
