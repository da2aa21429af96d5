"""A node's own health: what its heartbeat says of it, and the status map of the whole cluster as seen from here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from broker.status.conflicts import add_up
from broker.status.heartbeats import DOWN_AFTER_S, Heartbeat, measure_machine
from broker.status.status_map import BEHIND_S, View, status_map

if TYPE_CHECKING:
    from broker.node import Broker

GRACE_S = 5.0
"""After its start a broker does not call workers missing that have had no time to connect."""
DISK_ALERT_PCT = 90.0


class Health:
    """Looks at one broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._since = time.monotonic()

    def heartbeat(self) -> Heartbeat:
        """Return this node's heartbeat as of now."""
        broker = self._broker
        document, machine = broker.document, measure_machine(broker.config.state_dir)
        state, error, alerts = self._judge()
        if machine.disk_pct >= DISK_ALERT_PCT:
            text = f"the disk of {broker.config.state_dir} is {machine.disk_pct:.0f} % full"
            alerts.append({"kind": "disk", "text": text})
        return Heartbeat(
            document.cluster, broker.cid, document.epoch, document.serial, time.time_ns() // 1000,
            machine.uptime_s, machine.load1, machine.mem_pct, machine.disk_pct,
            state, error, tuple(alerts), broker.retainer.held(), broker.own, dict(broker.applied),
            add_up(session.counters for session in broker.local.sessions.workers()),
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Return the map of `pmgcm status --json`."""
        broker = self._broker
        views = {broker.cid: View(self.heartbeat(), 0.0, broker.applied, "", 0.0)}
        for cid, link in broker.peers.items():
            applied = broker.acked.get(cid, {})
            views[cid] = View(link.heartbeat, link.age_s, applied, link.problem, link.clock_skew_s)
        now = time.monotonic()
        return status_map(broker.document, views, broker.clocks, now=now, down_after_s=DOWN_AFTER_S)

    def _judge(self) -> tuple[str, str, list[dict[str, str]]]:
        """Return the state (`A` or `S`), what is wrong ("" when nothing), and the alerts."""
        broker = self._broker
        state, error = "A", ""
        alerts = [*broker.retainer.alerts(), *({"kind": "journal", "text": text} for text in broker.damage)]
        sessions = broker.local.sessions.workers()
        for session in sessions:
            alerts += session.alerts
            if session.state == "S":
                state = "S"
            if session.error:
                text = f"{session.worker}: {session.error}"
                error = error or text
                advice = f" ({session.hint})" if session.hint else ""
                since = f", for {time.monotonic() - session.error_since:.0f} s"
                alerts.append({"kind": "error", "text": text + advice + since})
        for origin, link in broker.peers.items():
            follower = broker.followers.get(origin)
            if not link.up and time.monotonic() - self._since > GRACE_S:
                reason = f": {link.problem}" if link.problem else ""
                alerts.append({"kind": "not-receiving", "text": f"nothing is received from node {origin}{reason}"})
            if link.up and link.refused:
                text = f"something that node {origin} sent was refused: {link.refused}"
                alerts.append({"kind": "refused", "text": text})
            if link.up and link.control_problem:
                alerts.append(
                    {"kind": "control", "text": f"nothing can be asked of node {origin}: {link.control_problem}"}
                )
            clock, done = broker.clocks.get(origin), broker.applied.get(origin)
            if clock is not None and done is not None:
                behind_s = clock.lag_s(time.monotonic(), done.position.lsn)
                if behind_s > BEHIND_S:
                    text = f"what came from node {origin} has not been applied for {behind_s:.0f} s"
                    alerts.append({"kind": "not-applying", "text": text})
            if link.up and follower is not None and follower.replaying:
                alerts.append({"kind": "replay", "text": f"fetching what was missed of node {origin}'s chain"})
        if broker.journals is not None and broker.journals.failure is not None:
            error = str(broker.journals.failure)
        present = {session.worker for session in sessions}
        wanted = ["capture", *(f"apply:{cid}" for cid in sorted(broker.document.cids - {broker.cid}))]
        missing = [name for name in wanted if name not in present]
        if not error and missing and time.monotonic() - self._since > GRACE_S:
            running = f"not running: {', '.join(missing)}"
            error = running if "supervisor" in present else "the agent is not running"
        return state, error, alerts
