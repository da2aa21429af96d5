"""Synchronous mode on the master: collects what slaves have, and tells capture which commits may return.

The rules are `pmgsync.core.synchronous`. Capture confirms to PostgreSQL what it is told here, as far as it is on the
journal's disk; a commit returns when its record is confirmed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.chains.chains import Chains
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument, with_synchronous
from pmgsync.core.positions import ZERO, Position
from pmgsync.core.synchronous import EVERYTHING, Patience, Setting, acknowledged, counted, in_step, is_due
from pmgsync.errors import MembershipError, PmgsyncError

log = logging.getLogger(__name__)

TELL_S = 1.0
"""Capture is told at least so often: it notices that this broker is gone."""
AGAIN_S = 2.0
"""Between two attempts to change the document."""
WAITS_S = 2.0
"""A commit that has waited so long is told of in status."""


class SynchronousCommits:
    """What the master's commits wait for. On any other node it only says that nothing is held."""

    def __init__(
        self,
        cid: int,
        members: Members,
        chains: Chains,
        *,
        document: Callable[[], ClusterDocument],
        leads: Callable[[], bool],
        change_document: Callable[[ClusterDocument], object],
        tell: Callable[[Mapping[str, Any]], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            document: returns the cluster document in force.
            leads: says whether this node acts as master.
            change_document: signs and spreads a new document; raises PmgsyncError.
            tell: sends capture a message; False when there is none.
        """
        self._cid = cid
        self._members = members
        self._chains = chains
        self._document = document
        self._leads = leads
        self._change_document = change_document
        self._tell = tell
        self._clock = clock
        self._epoch = 0
        self._told: tuple[bool, Position] | None = None
        self._told_at = self._change_at = 0.0
        self._waits = False
        self._switches = 0
        self._stands = False
        self._begin()

    def _begin(self) -> None:
        """Begin to hold commits: what slaves have acknowledged before is not counted, so patience begins too."""
        self._patience, self._since = Patience(), self._clock()

    # -- what happens -------------------------------------------------------------------------------------------------

    def acknowledged(self, cid: int) -> None:
        """A member has said how far it is: commits may return at once."""
        document = self._document()
        if document.synchronous and cid in document.slaves and self._leads():
            self._tell_capture()

    def capture_began(self) -> None:
        """Tell a new capture what holds."""
        self._told, self._stands = None, False
        self._tell_capture()

    def capture_told(self, *, stands: bool) -> None:
        """Note whether the database waits for capture."""
        self._stands = stands

    def tick(self) -> None:
        """Look whether slaves came or went."""
        document = self._document()
        if document.epoch != self._epoch:
            self._epoch, self._told = document.epoch, None
            self._begin()
        setting = document.synchronous_wanted
        if self._leads() and document.master == self._cid and setting.slaves:
            self._look(document, setting)
        if self._told is None or self._clock() - self._told_at >= TELL_S:
            self._told = None
        self._tell_capture()

    def change(self, setting: Setting) -> None:
        """Set the mode, on the master.

        Raises:
            MembershipError: when more slaves are asked for than are there, or than are in step while commits wait.
            PmgsyncError: when the document cannot be changed.
        """
        document = self._document()
        named, there = len(document.slaves), len(self._in_step(document))
        if setting.slaves > named:
            raise MembershipError(
                f"the cluster has {named} slave{'' if named == 1 else 's'}, {setting.slaves} cannot be waited for",
                hint="witnesses and nodes that are joining do not count",
            )
        holds = document.synchronous and setting.slaves > 0
        if holds and setting.slaves > max(there, document.synchronous_wanted.slaves):
            raise MembershipError(
                f"{there} of {named} slaves are in step, so commits cannot wait for {setting.slaves}",
                hint="see `pmgcm status`, and try again when they are",
            )
        log.info("action=synchronous slaves=%d level=%s patience=%s", setting.slaves, setting.level, setting.patience_s)
        self._change_document(with_synchronous(document, setting, in_force=holds))
        self.tick()

    # -- judging ------------------------------------------------------------------------------------------------------

    def _look(self, document: ClusterDocument, setting: Setting) -> None:
        now, there = self._clock(), self._in_step(document)
        due = is_due(setting, in_force=document.synchronous, named=len(document.slaves), in_step=len(there))
        if due is not None:
            if now >= self._change_at:
                self._change_at = now + AGAIN_S
                self._bring(document, setting, in_force=due, there=there)
            return
        if not document.synchronous:
            return
        waiting_s = self._oldest_s(document)
        before = self._patience
        self._patience = before.looked(
            now, in_step=len(there) >= setting.slaves, waiting_s=waiting_s, patience_s=setting.patience_s
        )
        if self._patience.degraded != before.degraded:
            self._switches += 1
            word = "degraded" if self._patience.degraded else "restored"
            log.warning("action=synchronous-%s in_step=%s wanted=%d", word, sorted(there), setting.slaves)
        waits = not self._patience.degraded and waiting_s > WAITS_S
        if waits != self._waits:
            self._waits = waits
            log.warning("action=synchronous-%s in_step=%s", "waiting" if waits else "goes-on", sorted(there))

    def _bring(self, document: ClusterDocument, setting: Setting, *, in_force: bool, there: frozenset[int]) -> None:
        """Have the document say whether the mode is in force."""
        log.info("action=synchronous in_force=%s slaves=%s", in_force, sorted(there))
        self._begin()
        try:
            self._change_document(with_synchronous(document, setting, in_force=in_force))
        except PmgsyncError as error:
            log.error("action=synchronous-not-changed error=%s", error)

    def _counted(self, document: ClusterDocument) -> dict[int, Position]:
        """Return what of the own chain each slave has, by CID, as far as its word counts."""
        head = self._chains.heads().get(self._cid)
        if head is None:
            return {}
        found = {}
        for cid in document.slaves:
            said = self._members.said(cid, self._cid)
            if said is not None:
                position = counted(
                    said,
                    document.synchronous_wanted.level,
                    epoch=document.epoch,
                    master=document.master,
                    incarnation=head.incarnation,
                )
                if position is not None:
                    found[cid] = position
        return found

    def _reached(self, document: ClusterDocument) -> Position:
        slaves = document.synchronous_wanted.slaves
        return acknowledged(self._counted(document), self._whole(document), slaves) if slaves else ZERO

    def _whole(self, document: ClusterDocument) -> frozenset[int]:
        """Return the slaves that are reached and leave out no changes of tables."""
        said = {cid: self._members.said(cid, self._cid) for cid in document.slaves if self._members.up(cid)}
        return frozenset(cid for cid, word in said.items() if word is not None and word.whole)

    def _waiting_s(self, position: Position) -> float:
        clock = self._chains.clocks.get(self._cid)
        lsn = position.lsn if position.complete else position.lsn - 1
        return clock.lag_s(self._clock(), lsn) if clock is not None else 0.0

    def _oldest_s(self, document: ClusterDocument) -> float:
        """Return for how long the oldest transaction has been waiting that not enough slaves have acknowledged."""
        return min(self._waiting_s(self._reached(document)), self._clock() - self._since)

    def _in_step(self, document: ClusterDocument) -> frozenset[int]:
        found = self._counted(document)
        return in_step({cid: self._waiting_s(at) for cid, at in found.items() if self._members.up(cid)})

    def _tell_capture(self) -> None:
        document = self._document()
        holds = document.synchronous and document.master == self._cid and not self._patience.degraded
        told = (holds, self._reached(document) if holds else EVERYTHING)
        if told != self._told and self._tell(self._message(*told)):
            self._told, self._told_at = told, self._clock()

    def _message(self, holds: bool, position: Position) -> dict[str, Any]:
        epoch = self._document().epoch
        return {"op": "synchronous", "epoch": epoch, "holds": holds, "position": list(position)}

    # -- status -------------------------------------------------------------------------------------------------------

    def alerts(self) -> list[dict[str, str]]:
        """Return what an administrator should know."""
        text = self._problem()
        return [{"kind": "synchronous", "text": text}] if text else []

    def _problem(self) -> str:
        document = self._document()
        setting = document.synchronous_wanted
        if not setting.slaves or document.master != self._cid:
            return ""
        have, want = len(self._in_step(document)), setting.slaves
        if not document.synchronous:
            return f"commits do not wait for slaves yet: {have} of {want} are in step"
        if self._patience.degraded:
            return f"commits do not wait for slaves any more: {have} of {want} are in step"
        if self._waits:
            waiting_s = self._oldest_s(document)
            return f"commits have been waiting for slaves for {waiting_s:.0f} s: {have} of {want} are in step"
        whole = self._whole(document)
        if len(whole) < want and (stale := self._in_step(document) - whole):
            nodes = ", ".join(map(str, sorted(stale)))
            return f"changes of some tables are left out on node {nodes}, and commits do not wait for these"
        return ""

    def status(self) -> dict[str, Any]:
        """Return the map `synchronous` of `pmgcm status --json`; its contract is in README.md."""
        document = self._document()
        setting = document.synchronous_wanted
        found: dict[str, Any] = {
            "slaves": setting.slaves,
            "level": setting.level,
            "patience_s": setting.patience_s,
            "in_force": document.synchronous,
        }
        if document.master != self._cid or not setting.slaves:
            return found | {"state": None if setting.slaves else "off"}
        holds = document.synchronous and not self._patience.degraded
        return found | {
            "state": "degraded"
            if document.synchronous and not holds
            else "starting"
            if not holds or not self._stands
            else "waiting"
            if self._waits
            else "synchronous",
            "in_step": sorted(self._in_step(document)),
            "waiting_s": round(self._oldest_s(document), 3) if holds else 0.0,
            "switches": self._switches,
        }
