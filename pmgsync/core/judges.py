"""The judge of a chain: who may write what in each of its transactions, under the history that is held here. Pure.

Invariant: a change to a table of the master's is applied after every such change that its master had when it became
one. For the chains of two masters are applied side by side, and the same row may have been written by both: the
earlier master's chain must have come to the fork first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pmgsync.core.document import Epoch, Fork
from pmgsync.core.forks import NOTHING, Standing, judge
from pmgsync.core.frames import Header
from pmgsync.core.owners import Writers
from pmgsync.core.positions import format_lsn
from pmgsync.errors import AwaitedError, UnknownEpochError

Awaits = Callable[[int, Fork], str]
"""Takes the master before and the fork on its chain; returns what is still to be waited for before changes of the epoch
that begins there may be applied, "" when nothing is."""


class Judge:
    """Says of each transaction of a chain who may write what in it, under one history."""

    def __init__(
        self, origin: int, history: Sequence[Epoch], members: Collection[int], elsewhere: int, awaits: Awaits
    ) -> None:
        self._origin = origin
        self._history = history
        self._elsewhere = elsewhere
        self._awaits = awaits
        self._begun = {0}
        forks = [place for entry in history for place in (entry.start, entry.fork) if place is not None]
        self._marks = {place.lsn for place in forks}
        self._leads, self._owns = (
            Writers.at(origin, history[-1].master, members, leads=leads) for leads in (True, False)
        )

    def alike(self, first: int, last: int) -> bool:
        """Return True when the transactions of a frame with commit LSNs from one to another are all judged alike: the
        judgement is other on one side of a fork than on the other, and nowhere else."""
        return not any(first <= mark < last for mark in self._marks)

    def writers(self, header: Header, lsn: int) -> Writers:
        """Return the writers in a transaction of a frame with this header.

        Raises:
            UnknownEpochError: when that cannot be told yet.
            AwaitedError: when something else has to be applied here first.
        """
        verdict = judge(
            self._history,
            origin=self._origin,
            epoch=header.epoch,
            incarnation=header.incarnation,
            lsn=lsn,
            elsewhere=self._elsewhere,
        )
        if verdict.standing is Standing.UNKNOWN:
            raise UnknownEpochError(
                f"a transaction of node {self._origin} at {format_lsn(lsn)} is of epoch {header.epoch}, and this node "
                f"knows of epoch {self._history[-1].epoch} only",
                hint="it is applied as soon as the cluster document of that epoch has come here",
            )
        if verdict.standing is not Standing.COUNTS:
            return self._owns
        assert verdict.number is not None
        if verdict.number not in self._begun:
            entry, before = self._history[verdict.number], self._history[verdict.number - 1]
            reason = self._awaits(before.master, entry.fork or NOTHING)
            if reason:
                raise AwaitedError(f"what node {self._origin} wrote as master of epoch {entry.epoch} waits: {reason}")
            self._begun.add(verdict.number)
        return self._leads
