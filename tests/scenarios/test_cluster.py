"""Whole clusters: created, joined, written to, killed, compared. Real servers, services and command line."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from pmgsync.postgres.programs import pg_tool
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import BANK_SCHEMA, BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable, Witness

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]
PGBENCH_TABLES = ("pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history")


def pgbench(node: Node, *arguments: str) -> subprocess.Popen[bytes]:
    """Start pgbench on a node's database."""
    return subprocess.Popen(
        [str(pg_tool("pgbench")), *arguments, "-h", node.server.socket_dir, "-p", str(node.server.port), "-U",
         "postgres", node.dbname],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_every_kind_of_change_arrives(new_cluster: NewCluster) -> None:
    cluster = new_cluster(
        nodes=2,
        schema="""
        CREATE TABLE keyed (id int PRIMARY KEY, name text, big text);
        CREATE TABLE loose (a int, b numeric);
        INSERT INTO keyed SELECT g, 'row ' || g, repeat(md5(g::text), 200) FROM generate_series(1, 500) AS g;
        INSERT INTO loose VALUES (1, 1.0), (1, 1.0), (1, 1.00), (NULL, NULL);
        """,
    )
    master = cluster.master
    cluster.assert_equal(["keyed", "loose"])
    master.sql("UPDATE keyed SET name = upper(name) WHERE id % 7 = 0")
    master.sql("DELETE FROM keyed WHERE id % 11 = 0")
    master.sql("UPDATE keyed SET id = id + 10000 WHERE id < 20")
    master.sql("UPDATE loose SET b = 2 WHERE ctid = (SELECT ctid FROM loose WHERE a = 1 LIMIT 1)")
    master.sql("DELETE FROM loose WHERE a IS NULL")
    master.sql("BEGIN; INSERT INTO keyed VALUES (7777, 'never', ''); ROLLBACK")
    cluster.wait()
    cluster.assert_equal(["keyed", "loose"])
    master.sql("TRUNCATE keyed, loose")
    master.sql("INSERT INTO keyed VALUES (1, 'again', NULL)")
    cluster.wait(node=cluster.nodes[1])
    cluster.assert_equal(["keyed", "loose"])


def test_join_while_the_master_is_written_to(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=1, schema=BANK_SCHEMA)
    bank = Bank(cluster.master, 1, pause_s=0)
    work = Stoppable(bank.step)
    try:
        eventually(lambda: bank.committed > 200)
        newcomer = cluster.add_node("newcomer")
        cluster.join(newcomer)
        witness = Witness(newcomer)
        watch = Stoppable(witness.step)
        before = bank.committed
        eventually(lambda: bank.committed > before + 200)
        watch.stop()
    finally:
        work.stop()
    assert witness.looks > 5
    cluster.wait()
    cluster.assert_equal(BANK_TABLES)


@pytest.mark.campaign
def test_pgbench_ends_equal_whatever_is_killed(new_cluster: NewCluster) -> None:
    def fill(node: Node) -> None:
        assert pgbench(node, "-i", "-s", "2", "-q").wait(60) == 0

    cluster = new_cluster(nodes=2, seed=fill)
    master, slave = cluster.nodes
    load = pgbench(master, "-c", "4", "-T", "12")
    for node, service in ((slave, "agent"), (master, "broker"), (slave, "broker"), (master, "agent")):
        time.sleep(2)
        node.kill(service)
        node.start()
    assert load.wait(60) == 0
    cluster.wait()
    cluster.assert_equal(PGBENCH_TABLES)
    assert len(master.content("pgbench_history")) > 500


@pytest.mark.campaign
def test_status_tells_who_is_down_and_recovers(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    cluster.wait()
    eventually(lambda: master.pmgcm("status", check=False).returncode == 0)
    table = master.pmgcm("status").stdout
    assert table.splitlines()[0].startswith("NAME(CID)--------------IPADDRESS----ROLE-STATE---------UPTIME---LOAD")
    slave.kill("broker", signal.SIGSTOP)
    eventually(lambda: master.node_status(2)["state"] == "ERROR")
    assert master.pmgcm("status", check=False).returncode == 1
    slave.kill("broker", signal.SIGCONT)
    eventually(lambda: master.node_status(2)["state"] == "A", within_s=60)
    slave.kill("agent")
    eventually(lambda: "agent is not running" in (master.node_status(2)["error"] or ""), within_s=60)
    slave.start()
    eventually(lambda: master.node_status(2)["state"] == "A", within_s=60)
    master.sql("INSERT INTO t VALUES (1)")
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.parametrize("seed", [1])
def test_kill_every_service_under_load(new_cluster: NewCluster, seed: int) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    pick = random.Random(seed)
    bank, witness = Bank(master, seed), Witness(slave)
    threads = [Stoppable(bank.step), Stoppable(witness.step)]
    try:
        for node in (master, slave):
            for service in ("broker", "agent"):
                time.sleep(pick.uniform(0.3, 1.0))
                node.kill(service)
                time.sleep(pick.uniform(0.0, 0.5))
                node.start()
            for name, worker in node.workers().items():
                time.sleep(pick.uniform(0.1, 0.4))
                assert name
                worker.kill()
            time.sleep(pick.uniform(0.3, 1.0))
            node.server.kill()
            node.server.start()
    finally:
        for thread in threads:
            thread.stop()
    assert bank.committed > 100
    cluster.wait()
    cluster.assert_equal(BANK_TABLES)


@pytest.mark.campaign
def test_nodes_that_only_apply_publish_nothing(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    slaves = {number: node for number, node in enumerate(cluster.nodes, 1) if node is not cluster.master}
    before = {number: slave.node_status(number)["head"] for number, slave in slaves.items()}
    cluster.master.sql("INSERT INTO t SELECT g, g FROM generate_series(1, 100) AS g")
    cluster.wait()
    cluster.assert_equal(["t"])
    cluster.wait()  # now every capture has read what applying has written
    after = {number: slave.node_status(number)["head"] for number, slave in slaves.items()}
    assert after == before, "a slave has published what it applied"
