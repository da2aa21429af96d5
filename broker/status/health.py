"""The health of this node: its heartbeat, and the status map of the whole cluster as this node sees it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.chains.chains import Chains
from broker.chains.departed import Departed
from broker.chains.synchronous import SynchronousCommits
from broker.chains.trimming import Trimming
from broker.heartbeats.conflicts import add_up
from broker.heartbeats.heartbeat import DOWN_AFTER_S, Heartbeat
from broker.heartbeats.machine import Machine, measure_machine
from broker.members.link import MemberLink
from broker.members.members import Members
from broker.requests.sessions import Sessions
from broker.status.status_map import BEHIND_S, View, status_map
from pmgsync.config import NodeConfig
from pmgsync.core.membership import ClusterDocument
from pmgsync.divergence_files import DivergenceFiles

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""For so long after its start a broker does not report missing workers: they need time to connect."""
DISK_ALERT_PCT = 90.0
REFUSALS_SHOWN = 50

Alerts = list[dict[str, str]]


class Health:
    """Judges one node that is in a cluster."""

    def __init__(
        self,
        cid: int,
        config: NodeConfig,
        members: Members,
        chains: Chains,
        trimming: Trimming,
        departed: Departed,
        sessions: Sessions,
        *,
        document: Callable[[], ClusterDocument],
        joining: Callable[[int], Mapping[str, Any] | None],
        conf_problem: Callable[[], str],
        voting_problem: Callable[[], str],
        split_problem: Callable[[], str],
        lease: Callable[[], dict[str, Any]],
        synchronous: SynchronousCommits,
        refusals: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """Begin.

        Args:
            document: returns the cluster document in force.
            lease: returns what there is to say of the master's lease.
            refusals: returns what was refused to others at this node's ports lately.
            conf_problem, voting_problem: return what is wrong with cluster.conf, and with the record of votes.
            split_problem: returns a sentence while another side of the cluster has a master of its own.
        """
        self._cid = cid
        self._config = config
        self._members = members
        self._chains = chains
        self._trimming = trimming
        self._departed = departed
        self._sessions = sessions
        self._document = document
        self._joining = joining
        self._conf_problem = conf_problem
        self._voting_problem = voting_problem
        self._split_problem = split_problem
        self._lease = lease
        self._synchronous = synchronous
        self._refusals = refusals
        self._divergence = DivergenceFiles(config.state_dir)
        self._machine = Machine(0, 0.0, 0.0, 0.0)
        self._since = time.monotonic()

    def heartbeat(self) -> Heartbeat:
        """Return this node's heartbeat as of now."""
        document, machine = self._document(), self._measure()
        state, error, alerts = self._judge(document)
        if machine.disk_pct >= DISK_ALERT_PCT:
            text = f"the disk of {self._config.state_dir} is {machine.disk_pct:.0f} % full"
            alerts.append({"kind": "disk", "text": text})
        return Heartbeat(
            cluster=document.cluster,
            cid=self._cid,
            epoch=document.epoch,
            serial=document.serial,
            master=document.master,
            time_us=time.time_ns() // 1000,
            uptime_s=machine.uptime_s,
            load1=machine.load1,
            mem_pct=machine.mem_pct,
            disk_pct=machine.disk_pct,
            state=state,
            error=error,
            alerts=tuple(alerts),
            chains=self._chains.held(),
            own=self._chains.own.chain,
            applied=dict(self._chains.applied),
            conflicts=add_up(session.counters for session in self._sessions.workers()),
            trees=tuple(tree for session in self._sessions.workers() for tree in session.trees),
            over=frozenset(self._departed.over),
            level=self._level(),
            actions=tuple(action for session in self._sessions.workers() for action in session.actions),
        )

    def _level(self) -> str:
        """Return the level of the subscription as the agent has read it last, "" when it has not."""
        return next((session.level for session in self._sessions.workers() if session.level), "")

    def _measure(self) -> Machine:
        try:
            self._machine = measure_machine(self._config.state_dir)
        except OSError as error:
            # Every file descriptor may be taken for an instant. The last figures stand then.
            log.warning("action=machine-not-measured error=%s", error)
        return self._machine

    def status(self) -> dict[str, Any]:
        """Return the map of `pmgcm status --json`."""
        views = {self._cid: View(self.heartbeat(), 0.0, self._chains.applied, "", 0.0)}
        for link in self._members:
            cid = link.member.cid
            follower = self._chains.follower(cid)
            received = {"reconnects": link.reconnects, **(follower.counters if follower is not None else {})}
            views[cid] = View(
                link.heartbeat, link.age_s, self._members.acked(cid), link.problem, link.clock_skew_s, received,
                self._joining(cid),
            )  # fmt: skip
        now = time.monotonic()
        found = status_map(self._document(), views, self._chains.clocks, now=now, down_after_s=DOWN_AFTER_S)
        return found | {
            "lease": self._lease(),
            "synchronous": self._synchronous.status(),
            "refused": self._refusals()[:REFUSALS_SHOWN],
        }

    # -- judging ------------------------------------------------------------------------------------------------------

    @property
    def _started(self) -> bool:
        return time.monotonic() - self._since > GRACE_S

    def _judge(self, document: ClusterDocument) -> tuple[str, str, Alerts]:
        """Return the state (`A` or `S`), what is wrong ("" when nothing), and the alerts."""
        alerts = [*self._trimming.alerts(), *({"kind": "journal", "text": text} for text in self._chains.damage)]
        alerts += self._divergence.alerts()
        alerts += self._departed.alerts()
        alerts += self._synchronous.alerts()
        if problem := self._conf_problem():
            alerts.append({"kind": "cluster.conf", "text": problem})
        if problem := self._voting_problem():
            alerts.append({"kind": "votes", "text": problem})
        synchronising, error = self._judge_workers(alerts)
        for link in self._members:
            if link.member.cid not in document.joining:
                self._judge_member(link, alerts)
        if self._chains.journals.failure is not None:
            error = str(self._chains.journals.failure)
        if split := self._split_problem():
            alerts.append({"kind": "split", "text": split})
            error = split
        error = error or self._missing(document) or self._closed()
        return "S" if synchronising else "A", error, alerts

    def _judge_workers(self, alerts: Alerts) -> tuple[bool, str]:
        """Add the workers' alerts; return whether one is synchronising, and the first error."""
        synchronising, error = False, ""
        for session in self._sessions.workers():
            alerts += session.alerts
            synchronising = synchronising or session.state == "S"
            if session.error:
                text = f"{session.worker}: {session.error}"
                error = error or text
                advice = f" ({session.hint})" if session.hint else ""
                since = f", for {time.monotonic() - session.error_since:.0f} s"
                alerts.append({"kind": "error", "text": text + advice + since})
        return synchronising, error

    def _judge_member(self, link: MemberLink, alerts: Alerts) -> None:
        origin = link.member.cid

        def alert(kind: str, text: str) -> None:
            alerts.append({"kind": kind, "text": text})

        if not link.up and self._started:
            reason = f": {link.problem}" if link.problem else ""
            alert("not-receiving", f"nothing is received from node {origin}{reason}")
        if link.up and link.refused:
            alert("refused", f"something that node {origin} sent was refused: {link.refused}")
        if link.up and link.control_problem:
            alert("control", f"nothing can be asked of node {origin}: {link.control_problem}")
        clock, done = self._chains.clocks.get(origin), self._chains.applied.get(origin)
        if clock is not None and done is not None:
            behind_s = clock.lag_s(time.monotonic(), done.position.lsn)
            if behind_s > BEHIND_S:
                alert("not-applying", f"what came from node {origin} has not been applied for {behind_s:.0f} s")
        follower = self._chains.follower(origin)
        if link.up and follower is not None and follower.replaying:
            alert("replay", f"fetching what was missed of node {origin}'s chain")

    def _closed(self) -> str:
        """Return why this master may not write its tables, "" when it may, or is no master."""
        lease = self._lease()
        if lease.get("open", True) or lease["handing_over"] or not self._started:
            return ""
        if lease["has_voted_away"]:
            return "this master has voted for another: its tables are closed"
        have, voters, majority = len(lease["acknowledged"]), lease["voters"], lease["majority"]
        return f"the tables are closed: acknowledged by {have} of {voters} members, {majority} are needed"

    def _missing(self, document: ClusterDocument) -> str:
        """Return a sentence on workers that should be running and are not, "" when there are none."""
        present = {session.worker for session in self._sessions.workers()}
        if document.is_witness(self._cid):
            return ""
        wanted = ["capture", *(f"apply:{cid}" for cid in sorted(document.databases - {self._cid}))]
        missing = [name for name in wanted if name not in present]
        if not missing or not self._started:
            return ""
        return f"not running: {', '.join(missing)}" if "supervisor" in present else "the agent is not running"
