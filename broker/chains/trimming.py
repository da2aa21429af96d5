"""Keeps the journal within its limits: asks the retention rules, trims, and says who is left behind."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from broker.journal.retention import Decision, Limits, decide
from broker.status.heartbeats import HeldChain
from pmgsync.core.positions import Position

if TYPE_CHECKING:
    from broker.node import Broker

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
NEARLY_FULL = 0.8
"""Share of a limit at which status begins to warn."""


class Retainer:
    """Looks at all chains every few seconds."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._next = 0.0
        self._decisions: dict[int, Decision] = {}

    def held(self) -> dict[int, HeldChain]:
        """Return what this node's journal can serve, for the heartbeat."""
        journals = self._broker.journals
        if journals is None:
            return {}
        return {
            origin: HeldChain(head.incarnation, journals.first(origin), head.position)
            for origin, head in journals.chains().items()
        }

    def alerts(self) -> list[dict[str, str]]:
        """Return what an administrator should know of the journal."""
        broker, journals = self._broker, self._broker.journals
        if journals is None:
            return []
        alerts = []
        limit = broker.config.journal.max_bytes
        for origin in journals.chains():
            size = journals.size(origin)
            if size > NEARLY_FULL * limit:
                text = f"the journal of node {origin}'s chain has {size >> 20} MiB, its limit is {limit >> 20} MiB"
                alerts.append({"kind": "journal", "text": text})
            alerts += [{"kind": "journal", "text": note} for note in journals.opened(origin).notes]
        for origin, decision in self._decisions.items():
            for cid in sorted(decision.resync):
                text = f"node {cid} needs resync: the journal no longer has what it lacks of node {origin}'s chain"
                alerts.append({"kind": "needs-resync", "text": text})
        return alerts

    def tick(self) -> None:
        """Trim what nobody needs, or what the limits force away."""
        broker, journals = self._broker, self._broker.journals
        if journals is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL_S
        chains = journals.chains()
        known: dict[int, dict[int, Position | None]] = {}
        for cid in broker.document.cids:
            applied = broker.applied if cid == broker.cid else broker.acked.get(cid, {})
            known[cid] = {
                origin: done.position
                for origin, done in applied.items()
                if origin in chains and done.incarnation == chains[origin].incarnation
            }
        limits = Limits(broker.config.journal.max_bytes, broker.config.journal.max_age_s)
        self._decisions = decide(journals.held(), broker.document.cids, known, limits)
        for origin, decision in self._decisions.items():
            if decision.trim > journals.first(origin):
                journals.trim(origin, decision.trim)
