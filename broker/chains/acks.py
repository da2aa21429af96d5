"""Acknowledgements: this node tells the members how far each chain is applied here, and how far it is on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.chains.chains import Chains
from broker.heartbeats.heartbeat import Applied, pack_applied
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument

REPEAT_S = 0.5
"""In synchronous mode an acknowledgement is sent again after so long: it counts only as of the epoch that it names."""


class Acks:
    """Sends the acknowledgements of this node."""

    def __init__(
        self,
        cid: int,
        chains: Chains,
        members: Members,
        *,
        document: Callable[[], ClusterDocument],
        voted_epoch: Callable[[], int],
    ) -> None:
        """Begin.

        Args:
            document: returns the document in force.
            voted_epoch: returns the newest epoch in which this node has voted.
        """
        self._cid = cid
        self._chains = chains
        self._members = members
        self._document = document
        self._voted_epoch = voted_epoch
        self._repeat_at = 0.0

    def send(self) -> None:
        """Tell all members, when something has changed, or is to be said again."""
        now = time.monotonic()
        if self._chains.acks_due or (self._document().synchronous_wanted.slaves and now >= self._repeat_at):
            self._chains.acks_due, self._repeat_at = False, now + REPEAT_S
            self._members.send_all(self._ack(self._chains.applied) | {"durable": self._chains.durable()})

    def applied(self, origin: int) -> None:
        """Tell the master at once how far its chain is applied here, when its commits wait for that."""
        document = self._document()
        if document.synchronous and origin == document.master and self._cid in document.slaves:
            self._members.send(origin, self._ack({origin: self._chains.applied[origin]}))

    def _ack(self, applied: Mapping[int, Applied]) -> dict[str, Any]:
        document = self._document()
        # Who has voted for another does not follow this master any more: what it applies may be past the fork.
        epoch = max(document.epoch, self._voted_epoch())
        return {"op": "ack", "epoch": epoch, "master": document.master, **pack_applied(applied)}
