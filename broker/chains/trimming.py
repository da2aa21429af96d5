"""Keeps the journals within their limits: asks the retention rules, trims, and reports members left behind."""

from __future__ import annotations

import time
from collections.abc import Set

from broker.chains.chains import Chains
from broker.journal.retention import Decision, Limits, decide
from broker.members.members import Members
from pmgsync.core.positions import Position
from pmgsync.core.stretches import Stretch
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError

INTERVAL_S = 5.0
JOINING_BYTES = 1 << 30
"""What a chain's journal keeps for a node that is joining, beyond what members need."""
EXPORT = 0
"""Stands among the members for the export of what does not count any more: it needs its frames like a receiver."""
NEARLY_FULL = 0.8
"""Share of a limit at which status begins to warn."""


class Trimming:
    """Looks at all chains every few seconds."""

    def __init__(self, cid: int, chains: Chains, members: Members, limits: Limits, divergence: DivergenceFiles) -> None:
        self._cid = cid
        self._chains = chains
        self._members = members
        self._limits = limits
        self._divergence = divergence
        self._next = 0.0
        self._decisions: dict[int, Decision] = {}

    def alerts(self) -> list[dict[str, str]]:
        """Return what an administrator should know of the journals."""
        journals, limit = self._chains.journals, self._limits.max_bytes
        alerts = []
        for origin in journals.chains():
            size = journals.size(origin)
            if size > NEARLY_FULL * limit:
                text = f"the journal of node {origin}'s chain has {size >> 20} MiB, its limit is {limit >> 20} MiB"
                alerts.append({"kind": "journal", "text": text})
            alerts += [{"kind": "journal", "text": note} for note in journals.opened(origin).notes]
        for origin, decision in self._decisions.items():
            for cid in sorted(decision.resync - {EXPORT}):
                text = f"node {cid} needs resync: the journal no longer has what it lacks of node {origin}'s chain"
                alerts.append({"kind": "needs-resync", "text": text})
        return alerts

    def tick(self, members: Set[int], joining: Set[int]) -> None:
        """Trim what nobody needs, or what the limits force away.

        Args:
            members: the CIDs in the cluster document but those that are joining.
            joining: the others; they hold back less, for nobody knows whether they will ever arrive.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL_S
        journals = self._chains.journals
        heads = journals.chains()
        known: dict[int, dict[int, Position | None]] = {}
        for cid in members | joining:
            applied = self._chains.applied if cid == self._cid else self._members.acked(cid)
            known[cid] = {
                origin: done.position
                for origin, done in applied.items()
                if origin in heads and done.incarnation == heads[origin].incarnation
            }
        held = journals.held()
        known[EXPORT] = {origin: head.complete for origin, head in heads.items()}
        for stretch in self._pending():
            head = heads.get(stretch.origin)
            if head is not None and head.incarnation == stretch.incarnation and not stretch.exported:
                known[EXPORT][stretch.origin] = min(head.complete, Position(stretch.after))
        members = members | {EXPORT}
        self._decisions = decide(held, members, known, self._limits)
        lower = Limits(min(JOINING_BYTES, self._limits.max_bytes), self._limits.max_age_s)
        with_joining = decide(held, members | joining, known, lower) if joining else self._decisions
        for origin, decision in self._decisions.items():
            upto = min(decision.trim, with_joining[origin].trim)
            if upto > journals.first(origin):
                journals.trim(origin, upto)

    def _pending(self) -> list[Stretch]:
        try:
            return self._divergence.pending()
        except PmgsyncError:
            return []  # status says so; the limits hold all the same
