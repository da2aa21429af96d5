"""`pmgcm leave`: nothing of the cluster stays on a node but its data; interrupted anywhere it is done again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from tests.harness.cluster import Cluster, Node, eventually

pytestmark = pytest.mark.cluster
SCHEMA = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE keyless (v text); INSERT INTO t VALUES (1)"
RESIDUE = """
SELECT 'schema' FROM pg_namespace WHERE nspname = 'pmgsync'
UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots
UNION ALL SELECT 'publication ' || pubname FROM pg_publication
UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'identity ' || relname FROM pg_class WHERE relreplident = 'f' AND relnamespace = 'public'::regnamespace
"""


def residue(node: Node) -> list[str]:
    return sorted(row[0] for row in node.sql(RESIDUE))


def test_a_deleted_node_leaves_nothing_behind_and_may_join_again(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=SCHEMA)
    master, slave = cluster.nodes
    cluster.wait()
    assert residue(slave)
    master.pmgcm("delete", "2", "--yes")
    eventually(
        lambda: "no cluster defined" in slave.pmgcm("status", check=False).stderr, what="it knows that it is out"
    )
    refused = slave.pmgcm("leave", check=False)
    assert refused.returncode == 1
    assert "the replication slot pmgsync, which keeps" in refused.stderr, "it says what goes before it asks"
    assert residue(slave), "nothing was done without a yes"
    said = slave.pmgcm("leave", "--yes")
    assert "still a member" not in said.stderr
    assert residue(slave) == []
    assert slave.sql("SELECT id FROM t") == [(1,)], "the data stays"
    slave.sql("INSERT INTO t VALUES (7)")
    assert list((slave.directory / "state").glob("*journal*")) == []
    assert "nothing is left" in slave.pmgcm("leave").stdout
    slave.pmgcm(*cluster.join_arguments())
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.campaign
def test_who_may_leave(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=SCHEMA)
    master, slave = cluster.nodes
    refused = master.pmgcm("leave", "--yes", check=False)
    assert refused.returncode == 1
    assert "this node is the master" in refused.stderr
    # While its services do not run, and while it is still a member.
    slave.stop()
    said = slave.pmgcm("leave", "--yes")
    assert "still a member" in said.stderr
    assert "pmgcm delete 2` on node1 (127.0.0.1)" in said.stderr
    assert residue(slave) == []
    master.pmgcm("delete", "2", "--yes")
    said = master.pmgcm("leave", "--yes")
    assert "the only one of the cluster" in said.stderr
    assert residue(master) == []
    assert "no cluster defined" in master.pmgcm("status", check=False).stderr
    master.pmgcm("create")
    assert master.status()["nodes"][0]["cid"] == 1


@pytest.mark.campaign
def test_a_broker_that_is_slow_to_answer_is_not_taken_for_a_dead_one(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema="CREATE TABLE t (id int PRIMARY KEY)")
    pid = cluster.master.processes["broker"].pid
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(6.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        cluster.master.pmgcm("delete", "2", "--yes")
    finally:
        timer.join()
    assert [node["cid"] for node in cluster.master.status()["nodes"]] == [1]
