"""The judge of a chain: who may write what in each of its transactions, under the history that is held here. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pmgsync.core.document import Epoch
from pmgsync.core.forks import Standing, judge
from pmgsync.core.frames import Header
from pmgsync.core.owners import Writers
from pmgsync.core.positions import format_lsn
from pmgsync.errors import UnknownEpochError


class Judge:
    """Says of each transaction of a chain who may write what in it, under one history."""

    def __init__(self, origin: int, history: Sequence[Epoch], members: Collection[int], elsewhere: int) -> None:
        self._origin = origin
        self._history = history
        self._elsewhere = elsewhere
        self._leads, self._owns = (
            Writers.at(origin, history[-1].master, members, leads=leads) for leads in (True, False)
        )

    def writers(self, header: Header, lsn: int) -> Writers:
        """Return the writers in a transaction of a frame with this header.

        Raises:
            UnknownEpochError: when that cannot be told yet.
        """
        standing = judge(
            self._history,
            origin=self._origin,
            epoch=header.epoch,
            incarnation=header.incarnation,
            lsn=lsn,
            elsewhere=self._elsewhere,
        )
        if standing is Standing.UNKNOWN:
            raise UnknownEpochError(
                f"a transaction of node {self._origin} at {format_lsn(lsn)} is of epoch {header.epoch}, and this node "
                f"knows of epoch {self._history[-1].epoch} only",
                hint="it is applied as soon as the cluster document of that epoch has come here",
            )
        return self._leads if standing is Standing.COUNTS else self._owns
