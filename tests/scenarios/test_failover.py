"""The master hands over, dies, sleeps, is cut off, comes back: clients write on all nodes throughout, and each
acknowledged write is accounted for. With `-s` each prints its figures in a line.
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import eventually
from tests.harness.failover import LEASE_S, SEEDS, Failover, answers, failovers
from tests.harness.health import NewCluster
from tests.harness.ledger import Outcome
from tests.harness.network import Network

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

NewNetwork = Callable[[int], Network]
PAUSED_S = 60


@pytest.fixture
def failover(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Callable[..., Failover]]:
    """Make a cluster with clients; `failover(nodes=3, seed=1)`."""
    with failovers(new_cluster, tmp_path) as make:
        yield make


# -- handing over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_switchover_under_load_loses_nothing(failover: Callable[..., Failover], nodes: int, seed: int) -> None:
    scene = failover(nodes=nodes, seed=seed).load()
    heir = scene.random.choice(scene.nodes[1:])
    scene.promote(heir)
    scene.await_open(heir)
    account = scene.settle()
    assert account.lost == () and account.exported == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_master_changes_there_and_back(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    for node in (scene.nodes[1], scene.nodes[0], scene.nodes[2]):
        scene.promote(node)
        scene.await_open(node)
    account = scene.settle()
    assert account.lost == () and account.exported == 0


# -- the master is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_a_killed_master_returns_as_a_slave(failover: Callable[..., Failover], nodes: int, seed: int) -> None:
    scene = failover(nodes=nodes, seed=seed).load()
    old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
    scene.kill_machine(old)
    scene.promote(heir, *(["--force"] if nodes == 2 else []))
    scene.await_open(heir)
    scene.start_machine(old)
    account = scene.settle()
    # Nobody else had them; the master's own disk has, and they are exported from it.
    assert account.lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_master_returns_after_two_more_promotions(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    old, *others = scene.nodes
    first, second = scene.random.sample(others, 2)
    scene.kill_machine(old)
    for heir in (first, second):
        scene.promote(heir)
        scene.await_open(heir)
        scene.pause(0.5, 1.5)
    # What it alone had stands in the way of what the master in between has written.
    scene.start_machine(old)
    account = scene.settle()
    assert account.lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_master_that_was_paused_wakes_as_a_slave(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
    with scene.asleep(old):
        scene.promote(heir)
        scene.await_open(heir)
        time.sleep(max(0.0, PAUSED_S - (time.time() - scene.began)))
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_lost_master_alone_had_lies_past_the_fork_that_the_promotion_names(
    failover: Callable[..., Failover], seed: int
) -> None:
    """Its disk is gone with it: what nobody else had got is lost, and nothing else is."""
    scene = failover(nodes=3, seed=seed).load()
    old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
    # Its clients go on, and nobody hears of it.
    old.kill("broker", signal.SIGSTOP)
    scene.pause(0.0, 1.0)
    scene.kill_machine(old)
    scene.note(heir)
    done = json.loads(heir.pmgcm("promote", "--yes", "--json").stdout)
    print(done)
    scene.await_open(heir)
    heir.pmgcm("delete", "1", "--yes")
    account = scene.settle(without=old)
    fork, lost = parse_lsn(done["fork"]), set(account.lost)
    acknowledged = scene.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1)
    # A commit lies after what its client saw last before it, and before what it sees in its next transaction.
    bounds = [*((one.lsn, two.lsn) for one, two in itertools.pairwise(acknowledged)), (acknowledged[-1].lsn, 1 << 63)]
    for write, (after, before) in zip(acknowledged, bounds, strict=True):
        assert before > fork if write.key in lost else after <= fork, f"{write}, fork {done['fork']}"
    assert lost <= {write.key for write in acknowledged}


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
    scene.await_open(heir)
    scene.pause(0, 5)
    links.heal(1)
    assert scene.settle().lost == ()


# -- promotions that are interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_promotion_that_is_killed_is_run_again(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    heir = scene.nodes[1]
    scene.kill_machine(scene.nodes[0])
    for service in ("broker", "agent", "broker"):
        process = scene.begin_promotion(heir)
        scene.pause(0.2, LEASE_S + 2)
        heir.kill(service)
        if service == "agent":
            for worker in heir.workers().values():
                worker.kill()
        process.kill()
        process.communicate()
        heir.start()
        eventually(lambda: answers(heir), what="the node is back")
    done = scene.promote(heir, check=False)
    assert done.returncode == 0 or "already master" in done.stderr, done.stderr
    scene.await_open(heir)
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_command_line_is_killed_in_a_promotion(failover: Callable[..., Failover], seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    heir = scene.nodes[2]
    process = scene.begin_promotion(heir)
    scene.pause(0.2, 1.5)
    process.kill()
    process.communicate()
    done = scene.promote(heir, check=False)
    assert done.returncode == 0 or "already master" in done.stderr, done.stderr
    scene.await_open(heir)
    account = scene.settle()
    assert account.lost == () and account.exported == 0
