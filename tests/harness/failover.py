"""A cluster with clients on every node, what befalls it, and the account of every acknowledged write afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pmgsync.core.divergence import read_lines
from pmgsync.core.document import Epoch
from pmgsync.core.signed import SignedDocument
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.health import NewCluster
from tests.harness.ledger import SCHEMA, TABLES, Account, Ledger, Outcome, assert_one_master, balance, write_profile

NewNetwork = Callable[[int], Any]
LEASE_S = 3
FIRST_SEED = int(os.environ.get("PMGSYNC_SEED", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + 5)
RETURN_S = 60
"""A returning master is a slave in sync within so many seconds."""


@dataclass(frozen=True)
class Asked:
    """A promotion that was asked for.

    Attributes:
        at: seconds since 1970.
        had: keys of configuration that the node had then.
    """

    cid: int
    at: float
    had: frozenset[str]


@dataclass
class Failover:
    """A cluster with clients on every node, and what is done to it.

    Attributes:
        began: when something was first done to the master.
        asked: the promotions that were asked for, in their order.
        witnesses: how many of them have joined.
    """

    cluster: Cluster
    seed: int
    began: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    witnesses: int = 0

    def __post_init__(self) -> None:
        self.nodes = list(self.cluster.nodes)
        self.random = random.Random(self.seed)
        self.ledger = Ledger(self.cluster)

    @property
    def fenced(self) -> bool:
        return len(self.nodes) + self.witnesses > 2

    def load(self) -> Failover:
        """Start the clients, and let them write a while that the seed says."""
        self.ledger.__enter__()
        eventually(lambda: len(self.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1)) > 20)
        self.pause(0.2, 2.0)
        return self

    def pause(self, least_s: float, most_s: float) -> None:
        """Let the clients go on for a while that the seed says."""
        time.sleep(self.random.uniform(least_s, most_s))

    # -- promotions ---------------------------------------------------------------------------------------------------

    def note(self, node: Node) -> None:
        """Note what a node has that is asked to become master now."""
        self.began = self.began or time.time()
        had = frozenset(row.strip("()") for row in node.content("configuration", "key"))
        self.asked.append(Asked(self.nodes.index(node) + 1, time.time(), had))

    def promote(self, node: Node, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Promote a node, as its administrator would; with two members and a master that is gone, by force."""
        self.note(node)
        done = node.pmgcm("promote", "--yes", *arguments, check=check)
        print(done.stdout, done.stderr, sep="")
        return done

    def begin_promotion(self, node: Node) -> subprocess.Popen[str]:
        """Promote a node beside the test; what it says goes to its `stdout`."""
        self.note(node)
        return subprocess.Popen(
            [*node.within, sys.executable, "-m", "cli.main", "--config", str(node.config), "promote", "--yes"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def await_open(self, node: Node) -> None:
        """Wait until a node takes configuration, from now on."""
        cid, since = self.nodes.index(node) + 1, time.time()
        eventually(lambda: self.ledger.acknowledged_since(cid, since), within_s=60, what=f"{node.name} takes writes")

    # -- machines -----------------------------------------------------------------------------------------------------

    def kill_machine(self, node: Node) -> None:
        """End a node's services and its server at once, as a loss of power would."""
        self.began = self.began or time.time()
        for worker in node.workers().values():
            worker.kill()
        node.kill("agent")
        node.kill("broker")
        node.server.kill()

    def start_machine(self, node: Node) -> None:
        """Start a node's server and services again."""
        node.server.start()
        node.start()

    @contextmanager
    def asleep(self, node: Node) -> Iterator[None]:
        """Stop every process of a machine meanwhile: services, workers, and the server with its sessions."""
        server = psutil.Process(node.server.pid)
        services = [psutil.Process(process.pid) for process in node.processes.values()]
        processes = [*services, *node.workers().values(), server, *server.children(recursive=True)]
        self.began = self.began or time.time()
        try:
            for process in processes:
                process.send_signal(signal.SIGSTOP)
            yield
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)

    # -- the account --------------------------------------------------------------------------------------------------

    def settle(self, *, without: Node | None = None) -> Account:
        """Stop the clients, wait until everything is applied everywhere, and account for every write.

        Args:
            without: a node whose disk is gone, and that was deleted.
        """
        self.ledger.stop()
        begun = time.monotonic()
        nodes = self.cluster.nodes
        if without is not None:
            nodes.remove(without)
            without.close()
        histories = eventually(lambda: agreed(nodes), within_s=RETURN_S, what="all nodes hold one document")
        eventually(lambda: _all_active(nodes), within_s=RETURN_S, what="all nodes are in sync")
        self.cluster.wait(node=self.nodes[histories[-1].master - 1])
        eventually(lambda: _equal(nodes), within_s=RETURN_S, what="all nodes have the same content")
        took = time.monotonic() - begun
        exported = exported_keys(nodes)
        account = balance(self.cluster, self.ledger, exported, gone=[self.nodes.index(without) + 1] if without else [])
        forced = any(entry.forced for entry in histories)
        assert_one_master(self.cluster, self.ledger, histories, fenced=self.fenced and not forced)
        self._print(account, histories, exported, took)
        return account

    def at_risk(self, histories: tuple[Epoch, ...]) -> set[str]:
        """Return the configuration that others had acknowledged and a node had not yet that was asked to be master.

        A promotion counts when its node was master in the end, or before another one was.
        """
        masters = {entry.master for entry in histories[1:]}
        counted = [one for one in self.asked if one.cid in masters]
        ends = [*(one.at for one in counted[1:]), float("inf")]
        acknowledged = self.ledger.of("configuration", Outcome.ACKNOWLEDGED)
        return {
            write.key
            for one, end in zip(counted, ends, strict=True)
            for write in acknowledged
            if write.cid != one.cid and write.begun < end and write.key not in one.had
        }

    def _print(self, account: Account, histories: tuple[Epoch, ...], exported: set[str], took: float) -> None:
        """Print a line of figures, for `pytest -s`."""
        risk, lost = self.at_risk(histories), set(account.lost)
        moved = {write.key for write in self.ledger.of("configuration", Outcome.ACKNOWLEDGED)} & (exported | lost)
        assert moved <= risk, f"it does not count, though the new master had it: {sorted(moved - risk)[:5]}"
        name, _, ids = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0].partition("[")
        first = [write.begun for write in self.ledger.of("configuration", Outcome.ACKNOWLEDGED, histories[-1].master)]
        opened = min((begun - self.began for begun in first if begun > histories[-1].when / 1e6), default=float("nan"))
        cells = {
            "scenario": name,
            "variant": ids.rstrip("]"),
            "seed": self.seed,
            "nodes": len(self.nodes),
            "gap_s": round(self.ledger.gap_s(self.began or time.time()), 2),
            "open_s": round(opened, 2),
            "risk": len(risk),
            "found": len(risk - exported - lost),
            "exported": len(risk & exported),
            "lost": len(lost),
            "in_sync_s": round(took, 1),
            "acknowledged": account.acknowledged,
            "refused": account.refused,
            "unknown": account.unknown,
        }
        print(f"SCENARIO {json.dumps(cells)}")


def agreed(nodes: list[Node]) -> tuple[Epoch, ...] | None:
    """Return the history that all nodes hold, None while they differ."""
    bodies = [(node.state_dir / "cluster.document").read_bytes() for node in nodes]
    documents = [SignedDocument.unpack(body).document for body in bodies]
    return documents[0].history if len({document.version for document in documents}) == 1 else None


def _all_active(nodes: list[Node]) -> bool:
    return all(state["state"] == "A" for node in nodes for state in node.status()["nodes"])


def _equal(nodes: list[Node]) -> bool:
    return all(len({tuple(node.content(table)) for node in nodes}) == 1 for table in TABLES)


def exported_keys(nodes: list[Node]) -> set[str]:
    """Return the keys of configuration in the finished divergence files of all nodes."""
    found = set()
    for node in nodes:
        for path in (node.state_dir / "divergence").glob("*.jsonl"):
            with path.open(encoding="utf-8") as lines:
                for change in read_lines(lines).changes:
                    if change.new is not None and (key := change.new.get(b"key")) is not None:
                        found.add(key.decode())
    return found


@contextmanager
def failovers(new_cluster: NewCluster, directory: Path) -> Iterator[Callable[..., Failover]]:
    """Make clusters for it; `make(nodes=3, seed=1)`. Clients are ended at the end."""
    made: list[Failover] = []

    def make(*, nodes: int, seed: int, namespaces: tuple[str, ...] = ()) -> Failover:
        cluster = new_cluster(
            nodes=nodes,
            schema=SCHEMA,
            profile=write_profile(directory),
            extra=f'[cluster]\nfence = "lease"\nlease_s = {LEASE_S}',
            namespaces=namespaces,
        )
        cluster.wait()
        made.append(Failover(cluster, seed))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.ledger.stop()


def answers(node: Node) -> Any:
    """Return a node's status, None while it does not answer."""
    try:
        return node.status()
    except Exception:  # whatever it is, it is asked again
        return None
