"""Forks: which changes to master-owned tables count, and what a node has that is past the fork. Pure, no I/O.

Invariant: for any transaction and any history, all members that hold the history judge alike, wherever they got the
frame from and whatever run of capture has marked it. So members that follow one history have the same master-owned
tables, as far as each has applied.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    UNKNOWN = "unknown epoch"
    """A later epoch than those known here: wait for its document, or, in a split, leave the changes out."""

    @property
    def diverges(self) -> bool:
        return self in {Standing.PAST_FORK, Standing.NOT_MASTER}


def judge(history: Sequence[Epoch], *, origin: int, epoch: int, incarnation: int, lsn: int) -> Standing:
    """Judge the changes to master-owned tables in one transaction.

    Args:
        history: of the document held.
        origin: CID of the chain.
        epoch: that the frame is marked with.
        lsn: of the transaction's commit; `incarnation` is the chain's.
    """
    if epoch > history[-1].epoch:
        return Standing.UNKNOWN
    reigns = [number for number, entry in enumerate(history) if entry.master == origin and entry.epoch <= epoch]
    if not reigns:
        return Standing.NOT_MASTER
    fork = fork_after(history, reigns[-1])
    if fork is None:
        return Standing.COUNTS
    # The mark may be later than the transaction: a capture that begins again marks what it reads with the epoch of now.
    # What is up to the fork was written by the master, and everybody else has taken it.
    return Standing.COUNTS if incarnation == fork.incarnation and lsn <= fork.lsn else Standing.PAST_FORK


def fork_after(history: Sequence[Epoch], number: int) -> Fork | None:
    """Return where the chain of the master of an entry was left, None when that is master to this day."""
    master = history[number].master
    left = next((entry for entry in history[number + 1 :] if entry.master != master), None)
    return None if left is None else left.fork or NOTHING


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
    for number, entry in enumerate(history):
        if entry.master != origin or (number and history[number - 1].master == origin):
            continue
        fork = fork_after(history, number)
        after = entry.start.lsn if entry.start is not None and entry.start.incarnation == incarnation else 0
        upto = MAX_LSN if fork is None else fork.lsn if fork.incarnation == incarnation else 0
        if after < upto:
            stretches.append((after, upto))
    return stretches
