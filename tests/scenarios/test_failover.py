"""The master hands over, dies, sleeps, is cut off, comes back: clients write on all nodes throughout, and each
acknowledged write is accounted for.

The short form of each runs always; `make campaign` repeats them with other seeds and shapes of clusters.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pmgsync.core.divergence import read_lines
from pmgsync.core.document import Epoch
from pmgsync.core.signed import SignedDocument
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.health import NewCluster
from tests.harness.ledger import SCHEMA, TABLES, Account, Ledger, Outcome, assert_one_master, balance, write_profile
from tests.harness.network import Network

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

NewNetwork = Callable[[int], Network]
LEASE_S = 3
SEEDS = range(int(os.environ.get("PMGSYNC_SEED", "1")), int(os.environ.get("PMGSYNC_SEED", "1")) + 5)
RETURN_S = 60
"""A returning master is a slave in sync within so many seconds."""
PAUSED_S = 60


class Failover:
    """A cluster with clients on every node, and what is done to it."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.nodes = cluster.nodes
        self.random = random.Random(seed)
        self.ledger = Ledger(cluster)
        self.began = 0.0

    @property
    def fenced(self) -> bool:
        return len(self.nodes) > 2

    def load(self) -> Failover:
        """Start the clients, and let them write a while that the seed says."""
        self.ledger.__enter__()
        eventually(lambda: len(self.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1)) > 20)
        time.sleep(self.random.uniform(0.2, 2.0))
        return self

    def promote(self, node: Node, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Promote a node, as its administrator would; with two members and a master that is gone, by force."""
        done = node.pmgcm("promote", "--yes", *arguments, check=check)
        print(done.stdout, done.stderr, sep="")
        return done

    def await_open(self, node: Node, since: float) -> None:
        """Wait until a node takes configuration."""
        cid = self.nodes.index(node) + 1
        eventually(lambda: self.ledger.acknowledged_since(cid, since), within_s=60, what=f"{node.name} takes writes")

    def kill_machine(self, node: Node) -> None:
        """End a node's services and its server at once, as a loss of power would."""
        for worker in node.workers().values():
            worker.kill()
        node.kill("agent")
        node.kill("broker")
        node.server.kill()

    def start_machine(self, node: Node) -> None:
        """Start a node's server and services again."""
        node.server.start()
        node.start()

    def processes(self, node: Node) -> list[psutil.Process]:
        """Return every process of a machine: services, workers, and the server with its sessions."""
        server = psutil.Process(node.server.pid)
        services = [psutil.Process(process.pid) for process in node.processes.values()]
        return [*services, *node.workers().values(), server, *server.children(recursive=True)]

    def settle(self) -> Account:
        """Stop the clients, wait until everything is applied everywhere, and account for every write."""
        begun = time.monotonic()
        self.ledger.stop()
        histories = eventually(lambda: _agreed(self.nodes), within_s=RETURN_S, what="all nodes hold one document")
        eventually(lambda: _all_active(self.nodes), within_s=RETURN_S, what="all nodes are in sync")
        master = self.nodes[histories[-1].master - 1]
        self.cluster.wait(node=master)
        eventually(lambda: _equal(self.nodes), within_s=RETURN_S, what="all nodes have the same content")
        took = time.monotonic() - begun
        exported = exported_keys(self.nodes)
        account = balance(self.cluster, self.ledger, exported)
        assert_one_master(self.cluster, self.ledger, histories, fenced=self.fenced and not _forced(histories))
        gap = self.ledger.gap_s(self.began or time.time())
        print(f"SCENARIO without a master {gap:.2f} s, in sync after {took:.1f} s: {account}")
        return account


def _agreed(nodes: list[Node]) -> tuple[Epoch, ...] | None:
    """Return the history that all nodes hold, None while they differ."""
    bodies = [(node.state_dir / "cluster.document").read_bytes() for node in nodes]
    documents = [SignedDocument.unpack(body).document for body in bodies]
    return documents[0].history if len({document.version for document in documents}) == 1 else None


def _all_active(nodes: list[Node]) -> bool:
    return all(state["state"] == "A" for node in nodes for state in node.status()["nodes"])


def _equal(nodes: list[Node]) -> bool:
    return all(len({tuple(node.content(table)) for node in nodes}) == 1 for table in TABLES)


def _forced(history: tuple[Epoch, ...]) -> bool:
    return any(entry.forced for entry in history)


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


@pytest.fixture
def failover(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Callable[..., Failover]]:
    """Make a cluster with clients; `failover(nodes=3, seed=1)`."""
    made: list[Failover] = []

    def make(*, nodes: int, seed: int, namespaces: tuple[str, ...] = ()) -> Failover:
        cluster = new_cluster(
            nodes=nodes,
            schema=SCHEMA,
            profile=write_profile(tmp_path),
            extra=f'[cluster]\nfence = "lease"\nlease_s = {LEASE_S}',
            namespaces=namespaces,
        )
        cluster.wait()
        made.append(Failover(cluster, seed))
        return made[-1]

    yield make
    for one in made:
        one.ledger.stop()


# -- handing over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_switchover_under_load_loses_nothing(failover: Callable[..., Failover], nodes: int, seed: int) -> None:
    scene = failover(nodes=nodes, seed=seed).load()
    heir = scene.random.choice(scene.nodes[1:])
    scene.began = time.time()
    scene.promote(heir)
    scene.await_open(heir, time.time())
    account = scene.settle()
    assert account.lost == () and account.exported == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_master_changes_there_and_back(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    scene.began = time.time()
    for node in (scene.nodes[1], scene.nodes[0], scene.nodes[2]):
        scene.promote(node)
        scene.await_open(node, time.time())
    account = scene.settle()
    assert account.lost == () and account.exported == 0


# -- the master is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_killed_master_returns_as_a_slave(failover: Callable[..., Failover], nodes: int, seed: int) -> None:
    scene = failover(nodes=nodes, seed=seed).load()
    old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
    scene.began = time.time()
    scene.kill_machine(old)
    scene.promote(heir, *(["--force"] if nodes == 2 else []))
    scene.await_open(heir, time.time())
    scene.start_machine(old)
    account = scene.settle()
    # Nobody else had them; the master's own disk has, and they are exported from it.
    assert account.lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_master_that_was_paused_wakes_as_a_slave(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
    paused = scene.processes(old)
    scene.began = time.time()
    try:
        for process in paused:
            process.send_signal(signal.SIGSTOP)
        scene.promote(heir)
        scene.await_open(heir, time.time())
        time.sleep(max(0.0, PAUSED_S - (time.time() - scene.began)))
    finally:
        for process in paused:
            process.send_signal(signal.SIGCONT)
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_master_that_is_cut_off_while_its_clients_write(
    failover: Callable[..., Failover], new_network: NewNetwork, nodes: int, seed: int
) -> None:
    links = new_network(nodes)
    scene = failover(nodes=nodes, seed=seed, namespaces=links.names).load()
    heir = scene.random.choice(scene.nodes[1:])
    scene.began = time.time()
    links.cut(1)
    scene.promote(heir, *(["--force"] if nodes == 2 else []))
    scene.await_open(heir, time.time())
    time.sleep(scene.random.uniform(0, 5))
    links.heal(1)
    assert scene.settle().lost == ()


# -- promotions that meet, and that are interrupted -------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_two_promotions_at_once(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    scene.began = time.time()
    scene.kill_machine(scene.nodes[0])
    both = [_begin_promotion(node) for node in scene.nodes[1:]]
    said = [process.communicate(timeout=120)[0] for process in both]
    print(*said, sep="\n---\n")
    assert any(process.returncode == 0 for process in both), said
    eventually(lambda: _agreed(scene.nodes[1:]), what="both survivors hold one document")
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_promotion_that_is_killed_is_run_again(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    heir = scene.nodes[1]
    scene.began = time.time()
    scene.kill_machine(scene.nodes[0])
    for service in ("broker", "agent", "broker"):
        process = _begin_promotion(heir)
        time.sleep(scene.random.uniform(0.2, LEASE_S + 2))
        heir.kill(service)
        if service == "agent":
            for worker in heir.workers().values():
                worker.kill()
        process.kill()
        process.communicate()
        heir.start()
        eventually(lambda: _answers(heir), what="the node is back")
    done = scene.promote(heir, check=False)
    assert done.returncode == 0 or "already master" in done.stderr, done.stderr
    scene.await_open(heir, time.time())
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_command_line_is_killed_in_a_promotion(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    heir = scene.nodes[2]
    scene.began = time.time()
    process = _begin_promotion(heir)
    time.sleep(scene.random.uniform(0.2, 1.5))
    process.kill()
    process.communicate()
    done = scene.promote(heir, check=False)
    assert done.returncode == 0 or "already master" in done.stderr, done.stderr
    scene.await_open(heir, time.time())
    account = scene.settle()
    assert account.lost == () and account.exported == 0


# -- by force ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_both_sides_of_a_split_are_forced(
    failover: Callable[..., Failover], new_network: NewNetwork, seed: int
) -> None:
    links = new_network(3)
    scene = failover(nodes=3, seed=seed, namespaces=links.names).load()
    first, second = scene.nodes[1:]
    scene.began = time.time()
    for number in (1, 2, 3):
        links.cut(number)
    for node in (first, second):
        scene.promote(node, "--force")
        scene.await_open(node, time.time())
    for number in (2, 3):
        links.heal(number)
    eventually(lambda: all("forced" in json.dumps(node.status()) for node in (first, second)), what="both say so")
    links.heal(1)
    decided = first.pmgcm("decide", "--yes")
    print(decided.stdout)
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slave_that_was_ahead_exports_what_the_new_master_never_had(
    failover: Callable[..., Failover], new_network: NewNetwork, seed: int
) -> None:
    links = new_network(5)
    scene = failover(nodes=5, seed=seed, namespaces=links.names).load()
    heir, ahead = scene.nodes[1], scene.nodes[4]
    # The heir hears nothing for a moment, the other one does; then that one is cut off too, and the master dies.
    links.cut(2)
    links.cut(3)
    time.sleep(scene.random.uniform(0.2, 1.0))
    links.cut(5)
    scene.began = time.time()
    scene.kill_machine(scene.nodes[0])
    links.heal(2)
    links.heal(3)
    scene.promote(heir)
    scene.await_open(heir, time.time())
    links.heal(5)
    eventually(ahead.status, what="the one ahead answers")
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


def _begin_promotion(node: Node) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*node.within, sys.executable, "-m", "cli.main", "--config", str(node.config), "promote", "--yes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def _answers(node: Node) -> Any:
    try:
        return node.status()
    except Exception:  # whatever it is, it is asked again
        return None
