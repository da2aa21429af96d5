"""Promotion: what a slave has to do to become master, in which order, and what may be lost by it. Pure, no I/O.

Invariants:

1. The next step follows from what *is* (documents, positions, what the database says), never from a note of what was
   done. So a promotion that is killed at any step goes on, or begins again, when it is run again.
2. Nothing is opened before the new epoch's document is stored, and no sequence is behind when tables open.
3. A switchover loses nothing: votes are asked for only when the new master has everything up to where the old one,
   closed, ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from pmgsync.core.document import ClusterDocument, Fork
from pmgsync.core.positions import ZERO, Position


@dataclass(frozen=True, slots=True)
class ChainPoint:
    """A position on one life of a chain."""

    incarnation: int
    position: Position

    @property
    def complete_lsn(self) -> int:
        """LSN up to which every transaction is in."""
        return self.position.lsn if self.position.complete else self.position.lsn - 1


@dataclass(frozen=True, slots=True)
class Survivor:
    """What is known of another member.

    Attributes:
        answers: it can be reached now.
        held: how far its journal has the master's chain; None: not at all. What only its database has, nobody can be
            given.
        first: the position after which the frames begin that its journal has.
    """

    cid: int
    answers: bool
    held: ChainPoint | None = None
    first: Position = ZERO


@dataclass(frozen=True, slots=True)
class Fetch:
    """What to fetch first: the master's chain up to `upto`, from this member."""

    source: int
    incarnation: int
    upto: Position


class Way(Enum):
    """How this node can become master."""

    IS_MASTER = "this node is already master"
    SWITCHOVER = "the master hands over"
    FAILOVER = "a majority votes"
    FORCED = "by force"
    REFUSED = "not without force"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a promotion would do.

    Attributes:
        fetch: None when nobody has more than this node.
        fork: where this node will be on the master's chain, if nothing more comes.
        known_loss: LSNs (from, to] that the master is known to have published and nobody reached has; None: none known.
            What it committed after it was last heard is lost beside that.
        unreadable: members that have the master's chain in another incarnation than this node: whether they have more
        cannot
            be told.
    """

    way: Way
    reason: str
    fetch: Fetch | None = None
    fork: Fork | None = None
    known_loss: tuple[int, int] | None = None
    unreadable: tuple[int, ...] = ()


def plan_promotion(
    document: ClusterDocument,
    cid: int,
    *,
    have: ChainPoint | None,
    others: Mapping[int, Survivor],
    published: Callable[[Fork], int] = lambda fork: fork.lsn,
    force: bool = False,
    leads: bool = True,
) -> Plan:
    """Return what a promotion of this node would do now.

    Args:
        have: how far this node has applied the master's chain.
        others: by CID; the master among them.
        published: returns the LSN up to which the master is known to have published beyond a fork, the fork's own when
            nothing is known.
        leads: this node acts as master when it is that; one that has voted for another, who did not become it, does
            not any more, and has to be voted for.
    """
    if document.master == cid and leads:
        return Plan(Way.IS_MASTER, "this node is already master")
    me = document.member(cid)
    if me is None or not me.may_be_master:
        what = "is a witness" if me is not None and me.role == "witness" else "is joining or not a member"
        return Plan(Way.REFUSED, f"this node cannot be master, for it {what}")
    if document.master == cid:
        have = None
    master = others.get(document.master)
    answering = {one.cid for one in others.values() if one.answers} | {cid}
    voters = len(answering & document.voters)
    survivors = [one for one in others.values() if one.answers and one.held is not None and one.cid != cid]
    fetch = _best(have, survivors)
    incarnation = have.incarnation if have is not None else fetch.incarnation if fetch is not None else 0
    upto = have.complete_lsn if have is not None else 0
    if fetch is not None:
        upto = fetch.upto.lsn
    fork = Fork(incarnation, upto)
    unreadable = tuple(
        sorted(one.cid for one in survivors if one.held is not None and one.held.incarnation != incarnation)
    )
    if master is not None and master.answers:
        return Plan(Way.SWITCHOVER, "the master answers: it closes its tables, and this node takes everything over")
    newest = published(fork)
    loss = (upto, newest) if newest > upto else None
    reached = (
        f"{voters} of {len(document.voters)} members that have a vote can be reached, {document.majority} are needed"
    )
    if document.is_majority(answering):
        return Plan(Way.FAILOVER, reached, fetch, fork, loss, unreadable)
    if force:
        return Plan(Way.FORCED, reached, fetch, fork, loss, unreadable)
    return Plan(Way.REFUSED, reached, fetch, fork, loss, unreadable)


def _best(have: ChainPoint | None, survivors: list[Survivor]) -> Fetch | None:
    """Return what of the master's chain survivors have beyond this node; the lowest CID of those who have most."""
    incarnation, begin = have.incarnation if have is not None else None, ZERO
    if have is not None:
        begin = Position(have.complete_lsn)
    for one in sorted(survivors, key=lambda one: one.cid):
        if one.held is None or (incarnation is not None and one.held.incarnation != incarnation):
            continue
        incarnation = one.held.incarnation
        upto = furthest(begin, _ranges(survivors, incarnation))
        if upto > begin and one.held.complete_lsn == upto.lsn:
            return Fetch(one.cid, incarnation, upto)
    return None


def _ranges(survivors: Iterable[Survivor], incarnation: int) -> list[tuple[Position, Position]]:
    held = [(one.first, one.held) for one in survivors if one.held is not None]
    return [(first, Position(point.complete_lsn)) for first, point in held if point.incarnation == incarnation]


def furthest(begin: Position, ranges: Iterable[tuple[Position, Position]]) -> Position:
    """Return how far a chain can be followed from a position by frames that somebody has.

    Args:
        ranges: what each journal has: the frames after a position, up to another.
    """
    ranges = list(ranges)
    while beyond := [upto for after, upto in ranges if after <= begin < upto]:
        begin = max(beyond)
    return begin


def fork_position(
    have: Position,
    others: Iterable[Position],
    ranges: Iterable[tuple[Position, Position]],
    *,
    since: Position | None = None,
    standing: Iterable[Position] = (),
) -> Position:
    """Return where on the master's chain a new epoch is to begin, when this node has applied it up to `have`.

    A copy may lie beyond the newest frame, and a broker that was killed may have handed on frames that it did not keep.
    The others wait until they have applied the chain up to the fork, so it must not lie where no frame leads. What this
    node has beyond it they fetch. Where a copy is all that this node has, the fork is no later than where any of the
    others stands, reached or not: while nobody writes, no frame comes that would lead it on.

    Args:
        others: how far the other databases that are reached have applied the chain.
        ranges: as in `furthest`, this node's own journal included.
        since: the chain has nothing between this and `have`; None: not known.
        standing: how far every other database had applied it when it was last heard, `ZERO` when it never was.
    """
    ranges = list(ranges)
    fork = min(have, max((furthest(one, ranges) for one in others), default=have))
    if since is None:
        return fork
    return min(fork, *(max(since, furthest(one, ranges)) for one in standing), have)


class Step(Enum):
    """The steps of a promotion, in the order in which they are shown."""

    READY = "this node gets ready"
    CLOSE = "the master closes its tables"
    DRAIN = "this node takes what it lacks from the master"
    FETCH = "this node takes what it lacks from the other members"
    WAIT = "the promises to the master before run out"
    VOTE = "the members vote"
    BEGIN = "the new epoch's document is stored"
    SEQUENCES = "sequences are set past every value used"
    OPEN = "the tables open"
    SPREAD = "the members take the document"
    DONE = "this node is master"


@dataclass(frozen=True, slots=True)
class Progress:
    """What is, when the next step is to be chosen.

    Attributes:
        is_master: the document held names this node as master.
        way: of the plan, while this node is not master.
        ready: nothing is missing in its tables, and, in a switchover, it is not far behind.
        applied: how far this node has applied the master's chain.
        goal: how far it has to: of a switchover, the end of the closed master's chain (None: not closed yet); else the
            plan's fetch (None: nothing to fetch).
        wait_s: how long this node itself may not vote yet.
        won: a majority has voted, or it is forced.
        sequences_set: for this epoch, as the database says.
        open: the database takes writes for this epoch.
        spread: the members that are reached hold the document.
    """

    is_master: bool
    way: Way
    applied: int = 0
    goal: int | None = None
    wait_s: float = 0.0
    won: bool = False
    sequences_set: bool = False
    open: bool = False
    spread: bool = False
    ready: bool = True


def next_step(progress: Progress) -> Step:
    """Return what is to be done next."""
    if progress.is_master:
        if not progress.sequences_set:
            return Step.SEQUENCES
        if not progress.open:
            return Step.OPEN
        return Step.DONE if progress.spread else Step.SPREAD
    if not progress.ready:
        return Step.READY
    if progress.way is Way.SWITCHOVER:
        if progress.goal is None:
            return Step.CLOSE
        if progress.applied < progress.goal:
            return Step.DRAIN
    elif progress.goal is not None and progress.applied < progress.goal:
        return Step.FETCH
    if progress.wait_s > 0 and progress.way is not Way.FORCED:
        return Step.WAIT
    return Step.BEGIN if progress.won or progress.way is Way.FORCED else Step.VOTE
