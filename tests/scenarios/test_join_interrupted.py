"""A join that is interrupted at any of its stages, by the network or by the end of a process: the same line ends well.

Whether the command that was running goes on or gives up is not what counts. When it gives up it says why, and the same
line, said again, has the node join. Nobody keeps anything of a try that failed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from broker.cluster.joiners import SILENCE_S
from broker.cluster.state_directory import StateDirectory
from pmgsync.agent.serving import STALLED_S
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.epochs import cid_of, held
from tests.harness.health import NewCluster
from tests.harness.network import Network

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

BIG = """
CREATE TABLE big (id int PRIMARY KEY, v text);
INSERT INTO big SELECT g, repeat(md5(g::text), 20) FROM generate_series(1, 150000) AS g;
"""
COMMAND_S = 200.0
_HELD = """
SELECT (SELECT count(*)::int FROM pg_replication_slots),
       (SELECT count(*)::int FROM pg_stat_activity WHERE application_name = 'pmgsync snapshot')
"""
_DATABASES = "SELECT datname::text FROM pg_database WHERE datname LIKE 'app%'"


@dataclass
class Scene:
    """A master, and a node that joins it; the second one's link is number 2."""

    cluster: Cluster
    newcomer: Node
    links: Network

    @property
    def master(self) -> Node:
        return self.cluster.master

    def joining(self) -> dict[str, object] | None:
        """Return what the master's status says of a joining node."""
        return next((node for node in self.master.status()["nodes"] if node["joining"] is not None), None)


# -- stages: when the fault comes -------------------------------------------------------------------------------------


def begins(scene: Scene) -> bool:
    """The command has just been started."""
    return True


def is_admitted(scene: Scene) -> bool:
    """The master has a joining member."""
    return scene.joining() is not None


def copies(scene: Scene) -> bool:
    """Part of the rows is there."""
    query = "SELECT count(*) FROM pg_stat_progress_copy WHERE bytes_processed > 0"
    return scene.newcomer.sql(query, dbname="postgres") != [(0,)]


def has_entered(scene: Scene) -> bool:
    """The copy is in place, and the node has the document; the master may not have heard of that yet."""
    return StateDirectory(scene.newcomer.state_dir).document() is not None


STAGES: tuple[Callable[[Scene], bool], ...] = (begins, is_admitted, copies, has_entered)

# -- faults -----------------------------------------------------------------------------------------------------------


def short_cut(scene: Scene) -> None:
    """The network is away for less time than the master waits for a joining node."""
    cut(scene, 3.0)


def long_cut(scene: Scene) -> None:
    """The network is away for longer than that."""
    cut(scene, SILENCE_S + 10)


def cut(scene: Scene, seconds: float) -> None:
    scene.links.cut(2)
    time.sleep(seconds)
    scene.links.heal(2)


def kill(scene: Scene, node: Node, service: str) -> None:
    """The service manager starts it again after two seconds."""
    node.kill(service)
    time.sleep(2)
    node.start(service)


FAULTS: dict[str, Callable[[Scene], None]] = {
    "short-cut": short_cut,
    "long-cut": long_cut,
    "newcomers-broker": lambda scene: kill(scene, scene.newcomer, "broker"),
    "newcomers-agent": lambda scene: kill(scene, scene.newcomer, "agent"),
    "masters-broker": lambda scene: kill(scene, scene.master, "broker"),
    "masters-agent": lambda scene: kill(scene, scene.master, "agent"),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_line_ends_well(new_cluster: NewCluster, new_network: Callable[[int], Network], fault: str) -> None:
    links = new_network(2)
    cluster = new_cluster(nodes=1, schema=BIG, namespaces=links.names)
    newcomer = cluster.add_node("newcomer")
    newcomer.address, newcomer.within = "10.213.7.2", ("ip", "netns", "exec", links.names[1])
    newcomer.write_config()
    scene = Scene(cluster, newcomer, links)
    for stage in STAGES:
        newcomer.start()
        said = interrupted(scene, stage, FAULTS[fault])
        print(f"{fault}, {stage.__name__}: {said}", flush=True)
        cluster.wait()
        cluster.assert_equal(["big"], "count(*), sum(id), min(v), max(v)")
        assert_whole(scene)
        cluster.master.pmgcm("delete", str(cid_of(newcomer)), "--yes")
        newcomer.pmgcm("leave", "--yes")
        assert_alone(scene.master)


def interrupted(scene: Scene, stage: Callable[[Scene], bool], fault: Callable[[Scene], None]) -> str:
    """Have the node join, and a fault come at a stage; say the line again until it ends well. Returns how it went."""
    newcomer, line = scene.newcomer, scene.cluster.join_arguments()
    command = [*newcomer.within, sys.executable, "-m", "cli.main", "--config", str(newcomer.config), *line]
    begun = time.monotonic()
    joining = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    eventually(lambda: stage(scene) or joining.poll() is not None, what=stage.__name__)
    reached = joining.poll() is None
    faulty = threading.Thread(target=fault, args=(scene,))
    faulty.start()
    said, _ = joining.communicate(timeout=COMMAND_S)
    took = time.monotonic() - begun
    faulty.join()
    assert "Traceback" not in said, said
    told = next((part for part in said.splitlines() if part.startswith("error: ")), said)
    how = f"the command gave up ({told})" if joining.returncode else "the command went on"
    tries = 0
    while not becomes_member(scene):
        # A node that was in its place, and cut off before it could say so, is taken out again like any that is silent.
        assert tries < 10, said
        again = newcomer.pmgcm(*line, check=False, timeout_s=COMMAND_S)
        assert "Traceback" not in again.stderr
        said, tries = again.stderr, tries + 1
    when = "" if reached else ", and was over before the fault"
    return f"{how}, {took:.0f} s{when}" + (f"; said again {tries} times" if tries else "")


def becomes_member(scene: Scene) -> bool:
    """Wait for a while until the master has the newcomer as a member whose copy is in place."""
    key = StateDirectory(scene.newcomer.state_dir).keys().curve_public

    def found() -> bool:
        member = held(scene.master).document.by_key(key)
        return member is not None and member.state != "joining"

    try:
        return bool(eventually(found, within_s=10))
    except AssertionError:
        return False


def assert_whole(scene: Scene) -> None:
    """Nothing is there but two members."""
    members = eventually(
        lambda: (found := scene.master.status()["nodes"]) and all(one["joining"] is None for one in found) and found,
        what="nobody is joining",
    )
    cids = {str(one["cid"]) for one in members}
    assert len(cids) == 2, "half a member stays"
    for node in scene.cluster.nodes:
        assert node.sql(_DATABASES) == [("app",)]
        # A copy whose receiver was cut off is given up when nothing of it was taken for a minute.
        eventually(
            lambda: node.sql(_HELD) == [(1, 0)],  # noqa: B023
            within_s=STALLED_S + 30,
            what="one slot, and no snapshot",
        )
        eventually(lambda: chains(node) == cids, what=f"{node.name} has the journals of {cids}")  # noqa: B023


def assert_alone(master: Node) -> None:
    """Nothing is left on the master of whoever came and went."""
    assert [one["cid"] for one in master.status()["nodes"]] == [1]
    assert master.sql("SELECT count(*)::int FROM pg_replication_slots") == [(1,)]
    eventually(lambda: chains(master) == {"1"}, what="the journals of the others are gone")


def chains(node: Node) -> set[str]:
    """Return the origins of which a node has journals."""
    return {path.name.partition("-")[0] for path in (node.state_dir / "journal").glob("*.db")}
