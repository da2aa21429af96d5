"""The lease: until when a master may write, and until when members have promised to support no other. Pure.

The master sends requests with its heartbeats; members acknowledge them. Times are seconds of the node's own monotonic
clock, handed in by the caller; no two clocks are ever compared, they only must not differ in rate by more than
`MARGIN`.

Invariant: at no instant do two masters have a live lease, if the members that vote are the same. For

- a member has promised itself to one master at a time. Whoever acknowledges a request promises, for a whole lease from
  its *receipt*, to acknowledge no other master and to vote for nobody else;
- a master counts an acknowledgement from when it *sent* the request, which was earlier, and for less than a whole
  lease;
- a majority is needed, and two majorities have a member in common;
- a member that was restarted may have promised: it waits for a whole lease, except for the master in its record.
  The record (`epochs.Record`) is on disk before the first acknowledgement to that master is sent;
- a master that releases its lease (`Lease.released`) does not count what was acknowledged before, and names the last
  request that it has sent; a promise that came from a later one stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from pmgsync.core.document import ClusterDocument

MARGIN = 0.1
"""The share of the lease that the master leaves unused: for clocks of different rate, and for closing."""


class Request(NamedTuple):
    """Names one request: the run of the master's broker that sent it (a random number), and a number that grows in
    it.
    """

    run: int
    number: int


@dataclass(frozen=True, slots=True)
class Promise:
    """A member's promise to one master.

    Attributes:
        master: CID; 0 when nobody knows to whom.
        until: seconds of this member's clock.
        request: the newest one acknowledged; None after a restart.
    """

    master: int
    until: float
    request: Request | None = None

    @classmethod
    def after_restart(cls, now: float, lease_s: float, master: int) -> Promise:
        """Return what a member must assume that it has promised; `master` is what its record says, 0 for none."""
        return cls(master, now + lease_s)

    def binds_against(self, cid: int, now: float) -> float:
        """Return for how many seconds more it may neither acknowledge nor vote for `cid`; 0.0 when it may."""
        return 0.0 if cid == self.master else max(0.0, self.until - now)

    def given(self, master: int, request: Request, received: float, lease_s: float) -> Promise:
        """Return the promise after a request was acknowledged. Ask `binds_against` first."""
        until = received + lease_s
        if master != self.master or self.request is None or request.run != self.request.run:
            return Promise(master, max(until, self.until) if master == self.master else until, request)
        return Promise(master, max(until, self.until), max(request, self.request))

    def released(self, master: int, request: Request, now: float) -> Promise:
        """Return the promise after a master has let go of everything up to a request; a late message changes
        nothing.
        """
        mine = self.request
        if master != self.master or mine is None or mine.run != request.run or mine.number > request.number:
            return self
        return replace(self, until=min(self.until, now))


@dataclass(frozen=True, slots=True)
class Lease:
    """What a master has been acknowledged, in one epoch. It begins with nothing: a master that returns is closed.

    Attributes:
        sent: for each other member, when the newest request was sent that it has acknowledged; seconds of our clock.
        not_before: acknowledgements of requests sent earlier do not count, for the lease was let go then.
        closing: it has been let go and not been taken up again.
        told: the deadline that the database goes by. It may be later than `until` says now: with one more voter a
            majority is more than those who have acknowledged.
    """

    epoch: int
    cid: int
    sent: Mapping[int, float] = field(default_factory=dict)
    not_before: float = -math.inf
    closing: bool = False
    told: float = -math.inf

    def tell(self, until: float) -> Lease:
        """Return the lease when the database is told a deadline; an earlier one than before, when it has confirmed."""
        return replace(self, told=until)

    def acknowledged(self, cid: int, sent: float) -> Lease:
        """Return the lease after a member has acknowledged the request that was sent at `sent`."""
        if sent < self.not_before or sent <= self.sent.get(cid, -math.inf):
            return self
        return replace(self, sent={**self.sent, cid: sent})

    def released(self) -> Lease:
        """Return the lease let go; only after the database has confirmed that it is closed. Then the others are
        told.
        """
        return replace(self, sent={}, not_before=math.inf, closing=True, told=-math.inf)

    def taken_up(self, now: float) -> Lease:
        """Return the lease of a master that goes on after all; only requests sent from now on count."""
        return replace(self, sent={}, not_before=now, closing=False)

    def until(self, document: ClusterDocument) -> float:
        """Return up to when the master may write: seconds of our clock, -inf for not at all, inf for without end."""
        if self.closing or document.epoch != self.epoch or document.master != self.cid:
            return -math.inf
        if document.fence == "none" or document.majority <= 1:
            return math.inf
        others = sorted((self.sent[cid] for cid in document.voters - {self.cid} if cid in self.sent), reverse=True)
        needed = document.majority - 1
        if len(others) < needed:
            return -math.inf
        return others[needed - 1] + document.lease_ms / 1000 * (1 - MARGIN)

    def binding(self, promise: Promise, document: ClusterDocument, now: float) -> Promise:
        """Return what binds a member: its promise, or, of a master, that it may write itself, whichever lasts longer.

        To be kept as the promise whenever the lease is replaced, also by one of the same master in a later epoch: what
        the database was told stays there.
        """
        own = min(max(self.told, self.until(document)), now + document.lease_ms / 1000)
        return Promise(self.cid, own) if own > promise.until else promise

    def missing(self, document: ClusterDocument, now: float) -> frozenset[int]:
        """Return the voters whose acknowledgement is older than the lease, for the message that says why it is
        closed.
        """
        lease_s = document.lease_ms / 1000 * (1 - MARGIN)
        return frozenset(cid for cid in document.voters - {self.cid} if self.sent.get(cid, -math.inf) + lease_s <= now)


def reign_began(document: ClusterDocument) -> int:
    """Return the epoch in which the master became it, 0 when it has been from the beginning.

    A master opens its tables only when its database says that its sequences were passed for that epoch or a later one;
    one that never was a slave has nothing to pass.
    """
    reign = 0
    for before, entry in pairwise(document.history):
        if entry.master != before.master:
            reign = entry.epoch
    return reign


def fence_due(document: ClusterDocument, wanted: str, holding: Mapping[int, tuple[int, int]]) -> str | None:
    """Return the fence that the master should write into the document now, None when it has the right one.

    With two members a fence would close the master whenever one of them is away, so it takes three. The fence comes
    back after a forced epoch, and goes when members go, only when a majority holds the document in force: else a master
    that is cut off could remove the others, open itself, and write beside the one that they have voted for.

    Args:
        wanted: `document.fence_wanted`, if nothing else is decided.
        holding: for each other member, the version of the document that it says it holds.
    """
    due = "lease" if wanted == "lease" and len(document.voters) >= 3 else "none"
    if due == document.fence or not is_settled(document, holding):
        return None
    return due


def is_settled(document: ClusterDocument, holding: Mapping[int, tuple[int, int]]) -> bool:
    """True when a majority, the master included, holds the document: no vote can lose it."""
    have = {cid for cid, version in holding.items() if version == document.version}
    return document.is_majority({document.master, *have})


def is_kept(document: ClusterDocument, holding: Mapping[int, tuple[int, int]]) -> bool:
    """Say whether no vote can lose the document any more: a majority holds it, or none can do without the master.

    Asked before a change of who is a member: one at a time, when the one before is kept. So any two documents by which
    votes may be counted have majorities with a member in common. Asked after a newcomer was written into it: only then
    may it be told its CID, or another could be given the same one. After a forced epoch nothing is to be waited for.
    """
    return len(document.voters) <= 2 or document.forced or is_settled(document, holding)
