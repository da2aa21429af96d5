"""When the chain of a node that was removed is over here, by what this node and the others say of it. Pure.

Nothing new comes on such a chain, but the members may have different parts of it. It is over when every member's
database has all that anybody has; the master's stands for it then. A database that can have no more of it, though the
master's has, fetches the rows from the master instead.

Invariant: a node forgets the chain only when no member needs anything of it any more, so who was away and comes back
finds it, or finds that it was done already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from broker.heartbeats.heartbeat import Applied, HeldChain
from pmgsync.core.positions import Position


class Ending(Enum):
    """What is to be done about a chain: wait, forget it, or fetch what was its from the master and forget it."""

    WAITS = "waits"
    OVER = "over"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Standing:
    """What a member says of a chain.

    Attributes:
        heard: the member is up, and knows that the chain's node was removed.
        held: what its journal has.
        applied: how far its database is, None: it has not begun, or does not say any more.
        over: its database needs nothing of the chain any more.
    """

    heard: bool
    held: HeldChain | None = None
    applied: Applied | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    ending: Ending
    reason: str = ""


def judge_ending(
    cid: int, standings: Mapping[int, Standing], *, master: int, databases: Collection[int], complete: Position | None
) -> Verdict:
    """Return what is to be done on this node about the chain of a node that was removed.

    Args:
        cid: this node; one that is not among `databases` only keeps a journal.
        standings: of all members, this one too.
        databases: the members that have a database, or are to have one.
        complete: the complete position up to which this node's journal has the chain, None when it holds none.
    """
    away = sorted(other for other, standing in standings.items() if not standing.heard)
    if away:
        return _waits(f"node {away[0]} was not heard")
    if cid not in databases:
        open_ = sorted(other for other in databases if not standings[other].over)
        return _waits(f"node {open_[0]} is not done with it") if open_ else Verdict(Ending.OVER)
    mine, masters = standings[cid].applied, standings[master].applied
    if mine is None:
        return _waits("this node has not begun with it")
    if cid != master and not standings[master].over:
        if masters is None:
            return _waits("the master has not begun with it")
        if _served(masters, cid, standings, complete) or _served(mine, cid, standings, complete):
            return _waits("there is more of it to be applied")
        if not _same(mine, masters):
            reason = f"the master's part of it ends at {masters.position}, this one's at {mine.position}"
            return Verdict(Ending.LOST, reason)
    if _served(mine, cid, standings, complete):
        return _waits("there is more of it to be applied")
    for other in sorted(databases):
        applied = standings[other].applied
        if not standings[other].over and (applied is None or not _same(applied, mine)):
            return _waits(f"node {other} has not applied all of it")
    return Verdict(Ending.OVER)


def _waits(reason: str) -> Verdict:
    return Verdict(Ending.WAITS, reason)


def _same(one: Applied, other: Applied) -> bool:
    return (one.incarnation, one.position) == (other.incarnation, other.position)


def _served(applied: Applied, cid: int, standings: Mapping[int, Standing], complete: Position | None) -> bool:
    """Return True when somebody has what follows there. The parts of a transaction that was never finished are none."""
    own = standings[cid].held
    for other, standing in standings.items():
        held = standing.held
        if held is None or held.incarnation != applied.incarnation or held.first > applied.position:
            continue
        head = held.head
        if other == cid:
            head = complete or held.first
        elif own is not None and own.incarnation == held.incarnation and held.head <= own.head:
            head = min(head, complete or own.first)
        elif not head.complete:
            # What precedes the parts cannot be told from here, unless this node fetches them.
            head = Position(head.lsn - 1) if own is not None and own.incarnation == held.incarnation else held.first
        if applied.position < head:
            return True
    return False
