"""The demo's failover: the master is lost in the middle, another node is promoted, and the old one comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cli.console import note
from cli.demo.traffic import FIRST_RID, WRITER_NUMBERS, MailWriter, RuleWriter, Writer, count_rules
from pmgsync.errors import PmgsyncError

if TYPE_CHECKING:
    from cli.demo.cluster import DemoCluster
    from cli.demo.latency import Latency, Watcher

BETWEEN_S = 0.5
PROMOTE_S = 60.0
RETURN_S = 120.0
NEW_FIRST = FIRST_RID + WRITER_NUMBERS
"""Numbers of what is written after the failover: none is used twice, not even one whose commit was not answered."""


class Failover(threading.Thread):
    """Loses node 1, promotes node 2, and starts node 1 again, each after a third of the time.

    Attributes:
        writers: what it has started, beside those it was given.
        error: what went wrong, "" when nothing did.
        result: what `pmgcm demo --json` says of it.
    """

    def __init__(
        self, cluster: DemoCluster, latency: Latency, seconds: float, rate: float, stop: threading.Event
    ) -> None:
        super().__init__(name="failover", daemon=True)
        self.writers: list[Writer] = []
        self.error = ""
        self.result: dict[str, Any] = {}
        self._cluster = cluster
        self._old, self._new = cluster.nodes[:2]
        self._latency = latency
        self._pause_s = seconds / 3
        self._rate = rate
        self._halt = stop
        self._lost: list[Writer | Watcher] = []
        self._rules: RuleWriter | None = None

    def watch(self, rules: RuleWriter, lost: list[Writer | Watcher]) -> None:
        """Take over who writes rules on the first node, and whatever else ends with it."""
        self._rules, self._lost = rules, [rules, *lost]

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # whatever it is, the demo must not call it a success
            said = error.message if isinstance(error, PmgsyncError) else f"{type(error).__name__}: {error}"
            self.error = f"{self.name}: {said}"
        finally:
            self._halt.set()

    def _run(self) -> None:
        cluster, old, new = self._cluster, self._old, self._new
        self._halt.wait(self._pause_s)
        for thread in self._lost:
            thread.may_end = True
        note(f"kill -9 of PostgreSQL, broker and agent on {old.name}, the master")
        cluster.kill(old)
        self._latency.leave(1)
        for thread in self._lost:
            thread.join()
        rules = self._rules
        assert rules is not None
        self._promote()
        again = RuleWriter(new.dsn, 2, self._halt, NEW_FIRST)
        self._start(again)
        self._await(lambda: again.done, PROMOTE_S, f"no rule can be changed on {new.name}")
        without = again.last - rules.last
        kept = count_rules(new.dsn, rules.first)
        note(f"{new.name} is master, {without:.1f} s after the last change on {old.name}")
        self._halt.wait(self._pause_s)
        note(f"starting {old.name} again")
        cluster.start(old)
        begun = time.monotonic()
        self._await(self._has_returned, RETURN_S, f"{old.name} is not in sync again")
        returned = time.monotonic() - begun
        note(f"{old.name} is a slave in sync, {returned:.1f} s after its start")
        self._start(MailWriter(old, 1, self._rate, self._halt, self._latency, NEW_FIRST))
        self._halt.wait(self._pause_s)
        self.result = {
            "lost": old.name,
            "master": new.name,
            "without_master_s": round(without, 2),
            "returned_s": round(returned, 1),
            "rules_acknowledged": rules.done,
            # One more than was acknowledged may be there: its commit was done, and the answer got lost.
            "rules_behind": max(0, rules.done - kept),
        }

    def _start(self, writer: Writer) -> None:
        self.writers.append(writer)
        writer.start()

    def _promote(self) -> None:
        force = ["--force"] if self._cluster.count == 2 else []
        note(" ".join(["pmgcm promote", *force, f"on {self._new.name}"]))
        deadline = time.monotonic() + PROMOTE_S
        while True:
            done = self._cluster.try_pmgcm(self._new, "promote", "--yes", *force, timeout_s=PROMOTE_S)
            for line in (done.stdout + done.stderr).splitlines():
                note(f"  {line}")
            if not done.returncode:
                return
            if time.monotonic() > deadline:
                raise PmgsyncError(f"{self._new.name} could not be promoted")
            time.sleep(BETWEEN_S)

    def _has_returned(self) -> bool:
        done = self._cluster.try_pmgcm(self._old, "status", "--json")
        try:
            status = json.loads(done.stdout)
        except ValueError:
            return False
        states = {node["cid"]: node["state"] for node in status["nodes"]}
        return status["epoch"] > 1 and set(states.values()) == {"A"}

    def _await(self, condition: Callable[[], object], within_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise PmgsyncError(f"{otherwise} after {within_s:.0f} s")
            for writer in self.writers:
                if writer.error:
                    raise PmgsyncError(writer.error)
            time.sleep(BETWEEN_S / 10)


def count_exported(cluster: DemoCluster) -> int:
    """Return how many transactions are in the divergence files of all nodes.

    Raises:
        PmgsyncError: when a node does not say.
    """
    files = [
        file
        for node in cluster.nodes
        for file in json.loads(cluster.pmgcm(node, "divergence", "list", "--json"))["files"]
    ]
    return sum(file["transactions"] for file in files)


def render(failover: dict[str, Any]) -> str:
    """Return the line of the summary for a person."""
    behind, exported = failover["rules_behind"], failover["exported"]
    lost = (
        "" if not behind else f"; {behind} of its changes had reached no other node, {exported} transactions exported"
    )
    return (
        f"failover {failover['without_master_s']:.1f} s from the last change on {failover['lost']} to the first on "
        f"{failover['master']}; {failover['lost']} back in sync {failover['returned_s']:.1f} s after its start{lost}"
    )
