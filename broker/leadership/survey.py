"""The survey before a promotion: who answers, how far each member has the master's chain, and what would be done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker.chains.chains import Chains
from broker.heartbeats.heartbeat import Applied, HeldChain
from broker.leadership.voter import Voter
from broker.members.link import MemberLink
from broker.members.members import Members
from pmgsync.core.document import Fork
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.positions import ZERO, Position, format_lsn
from pmgsync.core.promotion import ChainPoint, Plan, Survivor, fork_position, furthest, plan_promotion

SETTLED_S = 4.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What this broker knows of one other member.

    Attributes:
        answers: heartbeats come, and it can be asked.
        heard_s: seconds since it was last heard; None: not since this broker was started.
        journal, applied: how far its journal and its database have the master's chain; None: not at all.
        first: the position after which its journal's frames begin.
        version: of the document that it holds; (0, 0) when it was never heard.
    """

    cid: int
    answers: bool
    heard_s: float | None
    journal: ChainPoint | None
    applied: ChainPoint | None
    version: tuple[int, int]
    first: Position = ZERO


class Survey:
    """Looks at the members whenever it is asked."""

    def __init__(
        self, cid: int, members: Members, chains: Chains, voter: Voter, *, document: Callable[[], ClusterDocument]
    ) -> None:
        """Begin; `document` returns the cluster document in force."""
        self._cid = cid
        self._members = members
        self._chains = chains
        self._voter = voter
        self._document = document
        self._since = time.monotonic()

    def others(self) -> dict[int, Seen]:
        """Return what is known of the other members, by CID."""
        master = self._document().master
        return {link.member.cid: self._seen(link, master) for link in self._members}

    def _seen(self, link: MemberLink, master: int) -> Seen:
        cid, heartbeat = link.member.cid, link.heartbeat
        applied = _applied(self._members.acked(cid).get(master))
        if heartbeat is None:
            return Seen(cid, False, None, None, applied, (0, 0))
        chain = heartbeat.chains.get(master)
        journal = _journal(chain)
        return Seen(
            cid,
            link.up and link.can_be_asked,
            link.age_s,
            journal,
            journal if cid == master else applied,
            (heartbeat.epoch, heartbeat.serial),
            chain.first if chain is not None else ZERO,
        )

    @property
    def applied(self) -> ChainPoint | None:
        """How far this node's database has the master's chain; None: not at all."""
        return _applied(self._chains.applied.get(self._document().master))

    @property
    def journal(self) -> ChainPoint | None:
        """How far this node's journal has the master's chain; None: not at all."""
        head = self._chains.heads().get(self._document().master)
        return None if head is None else ChainPoint(head.incarnation, head.complete)

    @property
    def have(self) -> ChainPoint | None:
        """How far this node has the master's chain: what is in the journal and not applied yet needs nobody else."""
        journal, applied = self.journal, self.applied
        if journal is None or applied is None or journal.incarnation != applied.incarnation:
            return applied or journal
        return max(journal, applied, key=lambda point: point.complete_lsn)

    def ahead(self) -> list[int]:
        """Return the members that can be asked and hold a newer document than this node."""
        version = self._document().version
        return [one.cid for one in self.others().values() if one.answers and one.version > version]

    def published(self, origin: int, fork: Fork) -> int:
        """Return the LSN up to which a chain is known to go on beyond a fork, the fork's own when it is not.

        A copy of a database stands where its snapshot was taken, which the chain need not have reached then.
        """
        told = [link.heartbeat.chains.get(origin) for link in self._members if link.heartbeat is not None]
        own = self._chains.held().get(origin)
        heads = [_journal(chain) for chain in (*told, own)]
        newest = max((head.complete_lsn for head in heads if head and head.incarnation == fork.incarnation), default=0)
        return newest if newest > self.whole(origin, fork.incarnation, fork.lsn) else fork.lsn

    def whole(self, origin: int, incarnation: int, lsn: int) -> int:
        """Return the LSN up to which nothing follows on a chain what ends at an LSN, as its origin has told."""
        head, watermark = self._told(origin, incarnation)
        return lsn if head is None or head > Position(lsn) else max(lsn, watermark)

    def _told(self, origin: int, incarnation: int) -> tuple[Position | None, int]:
        """Return the newest end of a life of a chain that its origin has told of, None when it has not, and the LSN up
        to which nothing follows it.
        """
        link = self._members.link(origin)
        heartbeat = link.heartbeat if link is not None else None
        own, chain = (heartbeat.own, heartbeat.chains.get(origin)) if heartbeat is not None else (None, None)
        if own is None or chain is None or own.incarnation != incarnation:
            return None, 0
        return chain.head, own.watermark

    def reachable(self, have: ChainPoint) -> Position:
        """Return how far this node can follow the master's chain, from where it is, by what it and others have."""
        return furthest(Position(have.complete_lsn), self._ranges(have.incarnation))

    def _empty_since(self, have: ChainPoint) -> Position | None:
        """Return after where the master's chain has nothing up to a place, as the master has told; None: not known."""
        head, watermark = self._told(self._document().master, have.incarnation)
        return head if head is not None and head.complete and watermark >= have.complete_lsn else None

    def fork(self, have: ChainPoint) -> Fork:
        """Return where a new epoch is to leave the master's chain, when this node has applied it up to `have`."""
        document, seen = self._document(), self.others()
        found = {
            cid: Position(one.applied.complete_lsn)
            for cid, one in seen.items()
            if one.applied is not None and one.applied.incarnation == have.incarnation and cid in document.databases
        }
        fork = fork_position(
            Position(have.complete_lsn),
            [at for cid, at in found.items() if seen[cid].answers],
            self._ranges(have.incarnation),
            since=self._empty_since(have),
            standing=[found.get(cid, ZERO) for cid in document.databases - {self._cid, document.master}],
        )
        return Fork(have.incarnation, fork.lsn)

    def _ranges(self, incarnation: int) -> list[tuple[Position, Position]]:
        own = self._chains.held().get(self._document().master)
        found = [] if own is None else [(own.first, ChainPoint(own.incarnation, own.head))]
        found += [(one.first, one.journal) for one in self.others().values() if one.answers and one.journal is not None]
        return [(first, Position(head.complete_lsn)) for first, head in found if head.incarnation == incarnation]

    def plan(self, *, force: bool) -> Plan:
        """Return what a promotion of this node would do now."""
        seen = self.others()
        document = self._document()
        return plan_promotion(
            document,
            self._cid,
            have=self.have,
            others={cid: Survivor(cid, one.answers, one.journal, one.first) for cid, one in seen.items()},
            published=lambda fork: self.published(document.master, fork),
            force=force,
            leads=self._voter.may_lead,
        )

    @property
    def is_settled(self) -> bool:
        """False while this broker has been running so shortly that a member that is well may not have been heard."""
        heard = all(link.heartbeat is not None and link.can_be_asked for link in self._members)
        return heard or time.monotonic() - self._since > SETTLED_S

    def describe(self, plan: Plan) -> dict[str, Any]:
        """Return the map of `pmgcm promote --dry-run --json`; its contract is in README.md."""
        document, seen = self._document(), self.others()
        master, mine = seen.get(document.master), document.member(self._cid)
        wait_s = self._voter.bound_s(self._cid)
        return {
            "cluster": document.name,
            "epoch": document.epoch,
            "fence": document.fence,
            "node": {"cid": self._cid, "name": mine.name if mine is not None else ""},
            "way": plan.way.name.lower(),
            "reason": plan.reason,
            "master": None
            if master is None
            else {
                "cid": master.cid,
                "name": _name(document, master.cid),
                "answers": master.answers,
                "heard_s": _seconds(master.heard_s),
                "head": _lsn(master.journal),
            },
            "have": _lsn(self.have),
            "applied": _lsn(self.applied),
            "members": [
                {
                    "cid": one.cid,
                    "name": _name(document, one.cid),
                    "answers": one.answers,
                    "heard_s": _seconds(one.heard_s),
                    "votes": one.cid in document.voters,
                    "journal": _lsn(one.journal),
                    "applied": _lsn(one.applied),
                }
                for one in seen.values()
            ],
            "voters": len(document.voters),
            "majority": document.majority,
            "reached": len({self._cid, *(one.cid for one in seen.values() if one.answers)} & document.voters),
            "fetch": None
            if plan.fetch is None
            else {"cid": plan.fetch.source, "upto": format_lsn(plan.fetch.upto.lsn)},
            "fork": None if plan.fork is None else format_lsn(plan.fork.lsn),
            "known_loss": None
            if plan.known_loss is None
            else {
                "after": format_lsn(plan.known_loss[0]),
                "upto": format_lsn(plan.known_loss[1]),
                "bytes": plan.known_loss[1] - plan.known_loss[0],
            },
            "unreadable": list(plan.unreadable),
            "wait_s": round(wait_s, 3),
            "settled": self.is_settled,
        }


def _journal(chain: HeldChain | None) -> ChainPoint | None:
    return None if chain is None else ChainPoint(chain.incarnation, chain.head)


def _applied(applied: Applied | None) -> ChainPoint | None:
    return None if applied is None else ChainPoint(applied.incarnation, applied.position)


def _lsn(point: ChainPoint | None) -> str | None:
    return None if point is None else format_lsn(point.complete_lsn)


def _seconds(age_s: float | None) -> float | None:
    return None if age_s is None or math.isinf(age_s) else round(age_s, 3)


def _name(document: ClusterDocument, cid: int) -> str:
    member = document.member(cid)
    return member.name if member is not None else f"CID {cid}"
