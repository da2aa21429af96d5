"""Promotion on clusters of real processes: what is said before, what is done, and what is left when it is killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable

import psycopg2
import pytest

from pmgsync.core.positions import parse_lsn
from pmgsync.divergence_files import DivergenceFiles
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.command_line import refused
from tests.harness.epochs import held, voted
from tests.harness.failover import answers
from tests.harness.promotions import again_until_master, await_step, begun, kill_service, plan_of
from tests.harness.schema import STANDARD

pytestmark = pytest.mark.cluster

SWITCHOVER_STEPS = ("gets ready", "closes its tables", "members vote", "document is stored", "sequences", "tables open")


class Writers:
    """A client on each node that writes what only the master may write, and goes on when it is refused."""

    def __init__(self, nodes: list[Node]) -> None:
        self.acknowledged: list[tuple[float, int]] = []
        self.said: set[str] = set()
        self._numbers = itertools.count(1_000_000)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(node,), daemon=True) for node in nodes]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self.acknowledged) > 50, what="the master takes writes")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _write(self, node: Node) -> None:
        connection = psycopg2.connect(node.server.dsn(node.dbname))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                while not self._over.is_set():
                    number = next(self._numbers)
                    try:
                        cursor.execute("INSERT INTO t VALUES (%s, 'written')", (number,))
                    except psycopg2.errors.ReadOnlySqlTransaction as error:
                        self.said.add(str(error).partition("\n")[0])
                        time.sleep(0.01)
                    else:
                        self.acknowledged.append((time.time(), number))
        finally:
            connection.close()

    def gap_s(self) -> float:
        """Return the longest time in which nothing was acknowledged."""
        return max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(sorted(self.acknowledged)))

    def written(self) -> set[int]:
        return {number for _, number in self.acknowledged}


def kill(*nodes: Node) -> None:
    """End nodes' services at once, as a power cut would."""
    for node in nodes:
        workers = list(node.workers().values())
        for service in ("agent", "broker"):
            node.kill(service)
        for worker in workers:
            worker.kill()


def well(cluster: Cluster) -> None:
    """Wait until all nodes are well and follow one document."""

    def is_so() -> bool:
        documents = {held(node).document for node in cluster.nodes}
        exported = not any(DivergenceFiles(node.state_dir).pending() for node in cluster.nodes)
        if len(documents) > 1 or not exported:
            return False
        return all(one["state"] == "A" for node in cluster.nodes for one in node.status()["nodes"])

    eventually(is_so, what="all nodes are in sync")


def in_sync(cluster: Cluster, master: Node) -> None:
    """Wait until all nodes are well and follow one document, and compare their tables."""
    well(cluster)
    cluster.wait(node=master)
    stale = "SELECT count(*)::int FROM pmgsync.stale_table WHERE kind <> 'none'"
    eventually(lambda: all(node.sql(stale) == [(0,)] for node in cluster.nodes), what="all is fetched")
    cluster.wait(node=master)
    cluster.assert_equal(["t"])


def kept(node: Node) -> set[int]:
    return {number for (number,) in node.sql("SELECT id FROM t WHERE v = 'written'")}


def test_a_node_becomes_master(new_cluster: Callable[..., Cluster]) -> None:
    """Handed over under load; then by votes after the master was killed, which returns as a slave."""
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    refused(first.pmgcm("promote", check=False), "error: this node is already master")
    assert first.pmgcm("sync").stdout == "local node is master - nothing to do\n"
    plan = plan_of(second)
    assert (plan["way"], plan["reached"], plan["majority"]) == ("switchover", 3, 2)
    assert json.loads(second.pmgcm("promote", "--dry-run", "--json").stdout).keys() == plan.keys()
    assert "nothing would be lost" in second.pmgcm("promote", "--dry-run").stdout

    with Writers([first, second]) as writers:
        done = json.loads(second.pmgcm("promote", "--json").stdout)
        count = len(writers.acknowledged)
        eventually(lambda: len(writers.acknowledged) > count + 50, what="the new master takes writes")
    print(f"PROMOTION switchover: without a master {writers.gap_s():.2f} s; {done['steps']}")
    assert (done["way"], done["epoch"], done["master"], done["before"]) == ("switchover", 2, 2, 1)
    assert any("but a majority of the members does not answer" in said for said in writers.said)
    in_sync(cluster, second)
    assert kept(third) == writers.written()
    assert first.pmgcm("divergence", "list").stdout == "nothing has diverged on this node\n"

    kill(second)
    plan = eventually(lambda: (p := plan_of(third))["way"] == "failover" and p, what="the silence is noticed")
    assert (plan["known_loss"], plan["fork"]) == (None, plan["have"])
    refused(third.pmgcm("promote", check=False), "--yes")
    done = json.loads(third.pmgcm("promote", "--yes", "--json").stdout)
    print(f"PROMOTION failover: {done['steps']}")
    assert (done["way"], done["epoch"], done["votes"], done["not_reached"]) == ("failover", 3, [1, 3], [2])
    third.sql("INSERT INTO t VALUES (9501, 'of the third')")
    second.start()
    in_sync(cluster, third)


def knows_that_nothing_follows(node: Node, cid: int, origin: int) -> bool:
    """True when a node, with number `cid`, has heard that a chain has nothing after what it has applied of it."""
    watermark, applied = node.node_status(origin)["watermark"], node.node_status(cid)["positions"].get(str(origin))
    return watermark is not None and applied is not None and parse_lsn(watermark) >= parse_lsn(applied)


@pytest.mark.campaign
def test_without_a_majority_only_by_force(new_cluster: Callable[..., Cluster]) -> None:
    """Nobody writes: the second and the third stand where each had its copy, and no frame leads one to the other."""
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    eventually(lambda: knows_that_nothing_follows(third, 3, 1), what="the third has heard the master's watermark")
    kill(first, second)
    eventually(lambda: plan_of(third)["way"] == "refused", what="the silence of both is noticed")
    refused(
        third.pmgcm("promote", check=False), "1 of 3 members that have a vote can be reached, 2 are needed", "--force"
    )
    text = third.pmgcm("promote", "--force", "--yes").stdout
    assert "this node is master of epoch 2" in text and "node 1, 2 does not know it yet" in text
    third.sql("INSERT INTO t VALUES (9502, 'of the third')")
    for node in (first, second):
        node.start()
    in_sync(cluster, third)
    history = json.loads(first.pmgcm("history", "--json").stdout)["epochs"]
    assert [(entry["master"], entry["forced"]) for entry in history] == [(1, False), (3, True)]


@pytest.mark.campaign
def test_two_nodes(new_cluster: Callable[..., Cluster]) -> None:
    """Handed over without a fence, back by force, and the one who was away follows."""
    cluster = new_cluster(nodes=2, schema=STANDARD)
    first, second = cluster.nodes
    with Writers(cluster.nodes) as writers:
        print(second.pmgcm("promote").stdout)
        took_up(writers)
    print(f"PROMOTION of two: without a master {writers.gap_s():.2f} s")
    in_sync(cluster, second)
    assert kept(first) == writers.written()
    kill(second)
    refused(first.pmgcm("promote", check=False), "1 of 2 members that have a vote can be reached, 2 are needed")
    print(first.pmgcm("promote", "--force", "--yes").stdout)
    first.sql("INSERT INTO t VALUES (9503, 'of the first')")
    second.start()
    in_sync(cluster, first)


# -- killed, and run again --------------------------------------------------------------------------------------------


def killed_at(node: Node, step: str, service: str) -> None:
    """Promote a node, kill one of its services when a step is shown, and start it again."""
    with begun(node) as process:
        text = await_step(process, step)
        kill_service(node, service)
        node.start()
        rest, _ = process.communicate(timeout=120)
        print(f"KILLED {service} at {step!r}: {text}{rest}")
    eventually(lambda: answers(node), what="the node is back")


@pytest.mark.campaign
@pytest.mark.parametrize("service", ["broker", "agent"])
def test_a_switchover_that_is_killed_at_any_step(new_cluster: Callable[..., Cluster], service: str) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    with Writers(cluster.nodes) as writers:
        master = cluster.nodes[0]
        for step in SWITCHOVER_STEPS:
            heir = cluster.nodes[(cluster.nodes.index(master) + 1) % 3]
            killed_at(heir, step, service)
            again_until_master(heir)
            master = heir
            took_up(writers)
            well(cluster)
    in_sync(cluster, master)
    assert kept(cluster.nodes[0]) == kept(cluster.nodes[2]) == writers.written()


def took_up(writers: Writers) -> None:
    count = len(writers.acknowledged)
    eventually(lambda: len(writers.acknowledged) > count + 20, what="the new master takes writes")


@pytest.mark.campaign
def test_two_switchovers_at_once(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    with Writers(cluster.nodes) as writers:
        for _ in range(3):
            master = held(cluster.nodes[0]).document.master
            heirs = [node for number, node in enumerate(cluster.nodes, 1) if number != master]
            with begun(heirs[0]) as one, begun(heirs[1]) as two:
                said = [process.communicate(timeout=120)[0] for process in (one, two)]
                print(*said, sep="\n---\n")
                assert any(process.returncode == 0 for process in (one, two)), said
            took_up(writers)
            well(cluster)
    in_sync(cluster, cluster.nodes[held(cluster.nodes[0]).document.master - 1])
    assert kept(cluster.nodes[0]) == writers.written()


@pytest.mark.campaign
def test_a_second_command_joins_the_first(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, _ = cluster.nodes
    kill(first)
    eventually(lambda: plan_of(second)["way"] == "failover", what="the master's silence is noticed")
    with begun(second) as one:
        await_step(one, "promises to the master")
        one.kill()  # the promotion goes on without it
        done = second.pmgcm("promote", "--yes")
    assert "promises to the master" in done.stdout and "this node is master of epoch 2" in done.stdout
    assert [entry.epoch for entry in held(second).document.history] == [1, 2]


@pytest.mark.campaign
def test_a_member_that_has_voted_in_vain_is_fetched_back(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    kill(first)
    eventually(lambda: voted(third, second), what="the third node votes for the second, who does not become master")
    first.start()
    eventually(lambda: held(first).document.epoch == 3, what="the master begins an epoch beyond that vote")
    in_sync(cluster, first)
    first.sql("INSERT INTO t VALUES (8100, 'it goes on')")
    entry = json.loads(third.pmgcm("history", "--json").stdout)["epochs"][-1]
    assert (entry["epoch"], entry["master"], entry["fork"], entry["forced"]) == (3, 1, None, False)


@pytest.mark.campaign
@pytest.mark.parametrize("way", ["switchover", "failover"])
def test_nothing_diverges_when_an_idle_cluster_gets_another_master(
    new_cluster: Callable[..., Cluster], way: str
) -> None:
    """Neither on the old master nor on a node that was away meanwhile; and neither fetches anything."""
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    if way == "switchover":
        third.stop()
        second.pmgcm("promote", "--yes")
        third.start()
    else:
        kill(first)
        eventually(lambda: plan_of(second)["way"] == "failover", what="the master's silence is noticed")
        second.pmgcm("promote", "--yes")
        first.start()
    in_sync(cluster, second)
    for node in cluster.nodes:
        assert node.pmgcm("divergence", "list").stdout == "nothing has diverged on this node\n", node.name
        assert "action=stale " not in node.log("agent"), node.name
    second.sql("INSERT INTO t VALUES (9504, 'of the second')")
    in_sync(cluster, second)


# -- pmgcm sync -------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_a_node_is_told_where_the_master_is(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    other = new_cluster(nodes=1, schema=STANDARD, dbname="other").nodes[0]

    def sync(node: Node, port: int, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return node.pmgcm("sync", "--master_ip", "127.0.0.1", "--port", str(port), check=check)

    assert third.pmgcm("sync").stdout == "this node follows node1 (1), the master of epoch 1\n"
    assert sync(third, first.control).stdout == "this node follows node1 (1), the master of epoch 1\n"
    assert sync(first, first.control).stdout == "local node is master - nothing to do\n"
    refused(sync(third, second.control, check=False), "is not the master", "node1")
    refused(sync(third, third.control, check=False), "is this node itself")
    refused(sync(third, other.control, check=False), "error:")
    stranger = ("--master-ip", "127.0.0.1", "--port", str(other.control), "--key-port", str(other.key))
    refused(third.pmgcm("sync", *stranger, check=False), "does not know this node")
    refused(third.pmgcm("sync", "--master-ip", "127.0.0.9", check=False), "error:")
    third.stop()
    second.pmgcm("promote")
    third.start("broker")
    assert "this node follows node2 (2), the master of epoch 2" in sync(third, second.control).stdout
    assert held(third).document.epoch == 2
    third.start()
    in_sync(cluster, second)
