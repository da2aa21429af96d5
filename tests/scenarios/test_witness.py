"""A witness: it makes two nodes three voters, keeps what they publish, and has no database."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg2.errors
import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.command_line import refused
from tests.harness.failover import SEEDS, failovers
from tests.harness.health import NewCluster
from tests.harness.schema import STANDARD

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, nodes=2, schema=STANDARD)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Node]:
    """A machine with a broker, which has not joined yet."""
    node = Node(tmp_path / "third", "third", profile="mirror", dbname="none", address="127.0.0.1")
    node.has_database = False
    node.directory.mkdir()
    node.write_config()
    node.start("broker")
    try:
        yield node
    finally:
        node.close()


def fence(cluster: Cluster) -> str:
    return str(cluster.master.status()["lease"]["fence"])


@pytest.mark.campaign
def test_a_witness_makes_a_third_voter(cluster: Cluster, witness: Node) -> None:
    master, slave = cluster.nodes
    assert "two members and no witness" in master.pmgcm("status").stdout
    assert "--witness" in master.pmgcm("join-cmd").stderr
    done = witness.pmgcm(*cluster.join_arguments(), "--witness")
    assert "a witness of the cluster" in done.stdout
    eventually(lambda: fence(cluster) == "lease", what="the fence comes in force")
    shown = master.pmgcm("status").stdout
    assert "witness A" in " ".join(shown.split())
    assert "acknowledged by" in shown
    assert "promised to node1(1)" in witness.pmgcm("status").stdout
    cluster.wait()
    assert "ok" in witness.pmgcm("doctor").stdout

    # One of three is away: the master goes on, and the witness keeps what the slave will lack.
    slave.kill("broker")
    slave.kill("agent")
    master.sql("INSERT INTO t SELECT g, 'while away' FROM generate_series(9001, 9100) AS g")
    lsn = master.sql("SELECT pg_current_wal_flush_lsn()")[0][0]
    eventually(lambda: parse_lsn(master.node_status(1)["head"]) > parse_lsn(lsn) - 8192, what="it is published")
    eventually(
        lambda: witness.node_status(3)["held"].get("1") == master.node_status(1)["head"], what="the witness has it"
    )
    master.stop()
    slave.start()
    eventually(
        lambda: slave.sql("SELECT count(*) FROM t WHERE id > 9000") == [(100,)],
        what="the slave takes from the witness what the dead master had published",
    )
    master.start()
    cluster.wait()

    master.pmgcm("delete", "3", "--yes")
    eventually(lambda: fence(cluster) == "none", what="the fence goes with the third voter")
    witness.pmgcm("leave", "--witness", "--yes")
    witness.kill("broker", signal.SIGTERM)
    master.sql("INSERT INTO t VALUES (9999, 'two again')")
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        slave.sql("INSERT INTO t VALUES (9998, 'x')")
    cluster.wait()


@pytest.mark.campaign
def test_a_slave_and_a_witness_are_a_majority(cluster: Cluster, witness: Node) -> None:
    """What the slave has not received yet it takes from the witness before it becomes the master."""
    master, slave = cluster.nodes
    witness.pmgcm(*cluster.join_arguments(), "--witness")
    eventually(lambda: fence(cluster) == "lease", what="the fence comes in force")
    cluster.wait()
    refused(witness.pmgcm("promote", check=False), "is a witness")
    slave.stop()
    master.sql("INSERT INTO t SELECT g, 'while away' FROM generate_series(9001, 9100) AS g")
    head = eventually(lambda: master.node_status(1)["head"], what="the master tells its head")
    eventually(lambda: witness.node_status(3)["held"].get("1") == head == master.node_status(1)["head"])
    master.stop()
    slave.start()
    done = json.loads(slave.pmgcm("promote", "--yes", "--json").stdout)
    assert (done["way"], done["votes"], done["known_loss"]) == ("failover", [2, 3], None), done
    assert slave.sql("SELECT count(*) FROM t WHERE id > 9000") == [(100,)]
    slave.sql("INSERT INTO t VALUES (9500, 'of the new master')")
    master.start()
    eventually(lambda: all(node["state"] == "A" for node in slave.status()["nodes"]), what="the old master is a slave")
    cluster.wait(node=slave)
    cluster.assert_equal(["t"])


@pytest.mark.campaign
@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_master_of_two_and_a_witness_returns_as_a_slave(
    new_cluster: NewCluster, witness: Node, tmp_path: Path, seed: int
) -> None:
    """Nobody has to force anything, and every acknowledged write is accounted for."""
    with failovers(new_cluster, tmp_path) as make:
        scene = make(nodes=2, seed=seed)
        witness.pmgcm(*scene.cluster.join_arguments(), "--witness")
        eventually(lambda: fence(scene.cluster) == "lease", what="the fence comes in force")
        scene.witnesses = 1
        scene.load()
        old, heir = scene.nodes
        scene.kill_machine(old)
        scene.promote(heir)
        scene.await_open(heir)
        scene.start_machine(old)
        assert scene.settle().lost == ()
