"""Splits: what this node knows of another side of the cluster, while two forced promotions stand against each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pmgsync.core.document import ClusterDocument
from pmgsync.core.membership import SignedDocument, new_epoch
from pmgsync.core.signed import Order, compare
from pmgsync.errors import MembershipError

log = logging.getLogger(__name__)


class Splits:
    """The documents of the other sides, as members have offered them. In memory: who is heard offers his again.

    A document comes in here only when it was checked, and neither replaces the one held nor is replaced by it.
    """

    def __init__(self, held: Callable[[], ClusterDocument | None], changed: Callable[[], None]) -> None:
        """Begin.

        Args:
            held: returns the document in force.
            changed: is called when a side has come or gone.
        """
        self._held = held
        self._changed = changed
        self._sides: dict[int, ClusterDocument] = {}

    def note(self, cid: int, offered: SignedDocument) -> None:
        """Take over that a member is on another side."""
        before, self._sides[cid] = self.sides(), offered.document
        if self.sides() != before:
            log.error("action=split cid=%d epoch=%d master=%d", cid, offered.document.epoch, offered.document.master)
            self._changed()

    def follow_document(self) -> None:
        """Forget the sides that the document in force has decided about."""
        before = self.sides()
        held = self._held()
        self._sides = {
            cid: side
            for cid, side in self._sides.items()
            if held is not None and held.cluster == side.cluster and compare(held, side) is Order.SPLIT
        }
        if self.sides() != before:
            self._changed()

    def heard(self, cid: int, epoch: int, master: int) -> None:
        """Take over what a member's heartbeat says; one that has come over to this side is not on the other."""
        held, side = self._held(), self._sides.get(cid)
        if side is None or held is None or not is_known(held, epoch, master):
            return
        del self._sides[cid]
        self._changed()

    def sides(self) -> dict[int, int]:
        """Return who is on another side: CID → its newest epoch."""
        return {cid: side.epoch for cid, side in sorted(self._sides.items())}

    def problem(self) -> str:
        """Return a sentence on what is split, "" when nothing is."""
        held = self._held()
        if not self._sides or held is None:
            return ""
        there = {(side.epoch, side.master): side for side in self._sides.values()}
        others = " and ".join(f"{_name(side, side.master)} of epoch {side.epoch}" for side in there.values())
        return (
            f"the cluster is split: {_name(held, held.master)} is master of epoch {held.epoch} here, and {others} "
            "elsewhere, because promotions were forced; run `pmgcm decide` on the master whose side is to stay"
        )

    def decision(self, cid: int, newest: int) -> ClusterDocument:
        """Return the document with which this node, the master, replaces all other sides.

        Args:
            newest: epoch that this node has voted in.

        Raises:
            MembershipError: when nothing is split.
        """
        held = self._held()
        if not self._sides or held is None:
            raise MembershipError(
                "nothing is to be decided: no member that answers is on another side", hint="`pmgcm status` says more"
            )
        over = dict.fromkeys(
            (entry.epoch, entry.master)
            for side in self._sides.values()
            for number, entry in enumerate(side.history)
            if side.history[: number + 1] != held.history[: number + 1]
        )
        names = ", ".join(sorted({_name(side, side.master) for side in self._sides.values()}))
        return new_epoch(
            held,
            cid,
            epoch=max(held.epoch, newest, *(side.epoch for side in self._sides.values())) + 1,
            fork=None,
            when=time.time_ns() // 1000,
            reason=f"decided against {names} after a split",
            forced=True,
            over=list(over),
        )


def is_known(document: ClusterDocument, epoch: int, master: int) -> bool:
    """Return True when an epoch with this master is in a document's history."""
    return any((entry.epoch, entry.master) == (epoch, master) for entry in document.history)


def _name(document: ClusterDocument, cid: int) -> str:
    member = document.member(cid)
    return f"{member.name} ({cid})" if member is not None else f"CID {cid}"
