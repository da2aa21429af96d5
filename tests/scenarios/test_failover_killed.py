"""The master is lost, and what promotes its successor is killed at each step too: it is run again, and there is one
master, and an account of every acknowledged write. With `-s` it prints its figures in a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmgsync.divergence_files import DivergenceFiles
from tests.harness.cluster import Node, eventually
from tests.harness.failover import SEEDS, Failover, agreed, answers, failovers
from tests.harness.health import NewCluster
from tests.harness.promotions import again_until_master, await_step, kill_service, plan_of

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

STEPS = ("gets ready", "promises to the master", "members vote", "document is stored", "sequences", "tables open")
DELAYS_S = (0.0, 0.0, 0.02, 0.1)
"""After a step is shown; the next ones follow within as much."""


@pytest.fixture
def failover(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Callable[..., Failover]]:
    """Make a cluster with clients; `failover(nodes=3, seed=1)`."""
    with failovers(new_cluster, tmp_path) as make:
        yield make


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("killed", ["broker", "agent", "command"])
def test_something_is_killed_at_each_step(failover: Callable[..., Failover], killed: str, seed: int) -> None:
    """One master after the other is lost, and returns while the clients go on."""
    scene = failover(nodes=3, seed=seed).load()
    master = scene.nodes[0]
    for step in STEPS:
        heir = scene.random.choice([node for node in scene.nodes if node is not master])
        lost_at = time.time()
        scene.kill_machine(master)
        eventually(lambda: plan_of(heir)["way"] == "failover", what="the master's silence is noticed")  # noqa: B023
        killed_at(scene, heir, step, killed)
        again_until_master(heir)
        scene.await_open(heir)
        print(f"STEP {killed} killed at {step!r}: {heir.name} takes writes after {time.time() - lost_at:.2f} s")
        scene.start_machine(master)
        eventually(lambda: are_well(scene.nodes), what="all are well")
        master = heir
    assert scene.settle().lost == ()


def killed_at(scene: Failover, heir: Node, step: str, killed: str) -> None:
    """Promote a node, and kill one of its services or the command itself when a step is shown."""
    process = scene.begin_promotion(heir)
    try:
        text = await_step(process, step)
        time.sleep(scene.random.choice(DELAYS_S))
        if killed == "command":
            process.kill()
        else:
            kill_service(heir, killed)
            heir.start()
        rest, _ = process.communicate(timeout=120)
        print(f"KILLED {killed} at {step!r}: {text}{rest}")
    finally:
        process.kill()
        process.communicate()
    eventually(lambda: answers(heir), what="the node is back")


def are_well(nodes: list[Node]) -> bool:
    """True when all hold one document, and each is in sync and lacks nothing: only then it may be promoted."""
    stale = "SELECT count(*)::int FROM pmgsync.stale_table WHERE kind <> 'none'"
    return (
        agreed(nodes) is not None
        and not any(DivergenceFiles(node.state_dir).pending() for node in nodes)
        and all(one["state"] == "A" for node in nodes for one in node.status()["nodes"])
        and all(node.sql(stale) == [(0,)] for node in nodes)
    )
