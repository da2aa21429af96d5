"""Forks: which changes to master-owned tables count, and what a node has that is past the fork. Pure, no I/O.

Invariant: for any transaction and any history, all members that hold the history judge alike, wherever they got the
frame from and whatever run of capture has marked it. So members that follow one history have the same master-owned
tables, as far as each has applied.

A mark says which epoch the origin knew when it read the transaction from its WAL. That may be later than the commit
(capture has begun again) or earlier (the origin had not heard of the epoch yet). So places on the chain decide, where a
master's time began and where it was left. The mark only tells a chain's lives apart, and that an epoch is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from pmgsync.core.document import Epoch, Fork
from pmgsync.core.positions import MAX_LSN, Position, format_lsn

NOTHING = Fork(0, 0)
"""The fork of a master that nobody had anything of."""


class Standing(Enum):
    """How a transaction's changes to master-owned tables stand. Rows that a node owns, and merged ones, always
    count.
    """

    COUNTS = "counts"
    PAST_FORK = "past the fork"
    """Its master was replaced before: it diverges."""
    NOT_MASTER = "not master"
    """Its origin was no master then: it diverges."""
    ELSEWHERE = "other side"
    """Its origin is on the other side of a split: it does not count here until somebody decides."""
    UNKNOWN = "unknown epoch"
    """A later epoch than those known here: wait for its document."""

    @property
    def diverges(self) -> bool:
        return self in {Standing.PAST_FORK, Standing.NOT_MASTER, Standing.ELSEWHERE}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a transaction stands.

    Attributes:
        number: of the history's entry with which the time began that it was written in; None when it was in none.
    """

    standing: Standing
    number: int | None = None


def judge(
    history: Sequence[Epoch], *, origin: int, epoch: int, incarnation: int, lsn: int, elsewhere: int = 0
) -> Verdict:
    """Judge the changes to master-owned tables in one transaction.

    Args:
        history: of the document held.
        origin: CID of the chain.
        epoch: that the frame is marked with.
        lsn: of the transaction's commit; `incarnation` is the chain's.
        elsewhere: the newest epoch of the other side, while the origin is there in a split; else 0.
    """
    if epoch > history[-1].epoch:
        return Verdict(Standing.ELSEWHERE if epoch <= elsewhere else Standing.UNKNOWN)
    verdict = Verdict(Standing.NOT_MASTER)
    for number, entry in _reigns(history, origin):
        start, fork = entry.start, fork_after(history, number)
        here = start is not None and start.incarnation == incarnation
        # Of another life of the chain only the mark tells whether it is later than the one in which the time began.
        if lsn <= start.lsn if start is not None and here else epoch < entry.epoch:
            continue
        if fork is None or (fork.incarnation == incarnation and lsn <= fork.lsn):
            return Verdict(Standing.COUNTS, number)
        verdict = Verdict(Standing.PAST_FORK, number)
    return verdict


def _reigns(history: Sequence[Epoch], origin: int) -> Iterator[tuple[int, Epoch]]:
    """Yield the entries, with their numbers, with which a master's time began."""
    for number, entry in enumerate(history):
        if entry.master == origin and not (number and history[number - 1].master == origin):
            yield number, entry


def fork_after(history: Sequence[Epoch], number: int) -> Fork | None:
    """Return where the chain of the master of an entry was left, None when that is master to this day."""
    master = history[number].master
    left = next((entry for entry in history[number + 1 :] if entry.master != master), None)
    return None if left is None else left.fork or NOTHING


def last_of_reign(history: Sequence[Epoch], origin: int) -> Fork | None:
    """Return where the newest time of a node as master was left on its chain, None when it is master, or never was."""
    numbers = [number for number, _ in _reigns(history, origin)]
    return fork_after(history, numbers[-1]) if numbers else None


def forks_before(history: Sequence[Epoch]) -> dict[int, Fork]:
    """Return where the chain of each master before the one of now was left: all that counts of it, the latter has."""
    found = {origin: last_of_reign(history, origin) for origin in {entry.master for entry in history}}
    return {origin: fork for origin, fork in found.items() if fork is not None and fork != NOTHING}


@dataclass(frozen=True, slots=True)
class Divergence:
    """A stretch of one chain whose changes to master-owned tables do not count (any more), though a node has them.

    Attributes:
        after, upto: commit LSNs; the transactions above the one, up to the other.
    """

    origin: int
    incarnation: int
    after: int
    upto: int

    def __str__(self) -> str:
        return f"CID {self.origin}, {format_lsn(self.after)} to {format_lsn(self.upto)}"


def diverged(
    old: Sequence[Epoch], new: Sequence[Epoch], *, origin: int, incarnation: int, have: Position
) -> tuple[Divergence, ...]:
    """Return what a node has of a chain that counted under the history it held, and does not under the one it takes.

    For a returning master the chain is its own and `have` its end; for a slave, any chain that it followed and what it
    has applied of it. To be asked, and the answer stored, before the new document is: afterwards the old history is
    gone.

    Args:
        have: of a transaction that is half in nothing is committed.
    """
    end = have.lsn if have.complete else have.lsn - 1
    pieces = [(after, min(upto, end)) for after, upto in _counted(old, origin, incarnation)]
    for after, upto in _counted(new, origin, incarnation):
        pieces = [
            piece
            for low, high in pieces
            for piece in ((low, min(high, after)), (max(low, upto), high))
        ]  # fmt: skip
    return tuple(Divergence(origin, incarnation, low, high) for low, high in pieces if low < high)


def _counted(history: Sequence[Epoch], origin: int, incarnation: int) -> list[tuple[int, int]]:
    """Return the stretches (after, upto] of one life of a chain in which its origin was master."""
    stretches = []
    for number, entry in _reigns(history, origin):
        fork = fork_after(history, number)
        after = entry.start.lsn if entry.start is not None and entry.start.incarnation == incarnation else 0
        upto = MAX_LSN if fork is None else fork.lsn if fork.incarnation == incarnation else 0
        if after < upto:
            stretches.append((after, upto))
    return stretches
