"""The chain of a node that was removed: its rows come to everybody that can have them, and nothing else of it stays."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.health import NewCluster, alerts, wait_healthy
from tests.harness.ledger import SCHEMA, TABLES, write_profile

pytestmark = pytest.mark.cluster


def kept(node: Node, origin: int) -> list[str]:
    """Return what a node keeps of a chain."""
    found = [path.name for path in (node.state_dir / "journal").glob(f"*{origin}-*")]
    for table in ("stale_table", "relation", "conflict", "repair", "schema_failure"):
        found += [f"{table} {row}" for row in node.sql(f"SELECT * FROM pmgsync.{table} WHERE origin = %s", (origin,))]
    found += [f"position {row}" for row in node.sql(
        "SELECT * FROM pmgsync.position WHERE origin = %s AND incarnation <> 0", (origin,)
    )]  # fmt: skip
    found += [f"origin {row}" for row in node.sql(
        "SELECT roname FROM pg_replication_origin WHERE roname = %s", (f"pmgsync_{origin}",)
    )]  # fmt: skip
    for each in node.status()["nodes"]:
        found += [f"{each['name']} {key}" for key in ("held", "positions") if str(origin) in each[key]]
    return found + [name for name in node.workers() if name == f"apply:{origin}"]


def nothing_kept(cluster: Cluster, origin: int) -> None:
    """Wait until no node that still runs keeps anything of a chain."""
    running = [node for node in cluster.nodes if node.processes["broker"].poll() is None]
    eventually(
        lambda: not any(kept(node, origin) for node in running),
        what=f"nothing is kept of node {origin}",
    )


@pytest.mark.campaign
def test_what_one_member_lacks_comes_after_the_node_was_removed(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path))
    master, slave, leaver = cluster.nodes
    leaver.sql("INSERT INTO mail VALUES (3, 1, 'known to all')")
    cluster.wait()
    slave.kill("agent")
    slave.kill("broker")
    leaver.sql("INSERT INTO mail SELECT 3, n, n::text FROM generate_series(2, 50) AS n")
    eventually(lambda: len(master.content("mail")) == 50, what="the master has it")
    leaver.stop()
    slave.start("broker")
    master.pmgcm("delete", "3", "--yes")
    cluster.nodes.remove(leaver)
    time.sleep(1)
    assert kept(master, 3), "the slave still needs it"
    assert len(slave.content("mail")) == 1
    slave.start()
    nothing_kept(cluster, 3)
    assert len(slave.content("mail")) == 50
    cluster.assert_equal(TABLES)
    # The master answers for these rows now, and what was applied under a name that is gone is not sent again.
    master.sql("UPDATE mail SET key = 'changed' WHERE cid = 3 AND rid = 7; INSERT INTO mail VALUES (3, 99, 'new')")
    slave.sql("INSERT INTO mail VALUES (2, 1, 'own')")
    cluster.wait()
    cluster.assert_equal(TABLES)
    wait_healthy(cluster)
    # A node that joins now has them, and none of this; nor has one that starts again.
    slave.stop()
    slave.start()
    cluster.join(cluster.add_node("late"))
    cluster.wait()
    cluster.assert_equal(TABLES)
    assert not any(kept(node, 3) for node in cluster.nodes)
    leaver.close()


@pytest.mark.campaign
def test_what_nobody_can_give_any_more_is_fetched_from_the_master(new_cluster: NewCluster, tmp_path: Path) -> None:
    limit = '[journal]\nmax_size = "1MiB"'
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path), extra=limit)
    master, slave, leaver = cluster.nodes
    leaver.sql("INSERT INTO mail VALUES (3, 1, 'known to all')")
    cluster.wait()
    slave.stop()
    for number in range(1, 16):
        leaver.sql(
            "INSERT INTO mail SELECT 3, n, repeat(md5(n::text), 30) FROM generate_series(%s, %s) AS n",
            (number * 1000, number * 1000 + 999),
        )
        time.sleep(0.2)
    eventually(lambda: "needs resync" in alerts(master, 1), within_s=90, what="the master says who is left behind")
    cluster.nodes.remove(leaver)
    slave.start("broker")  # two of three are a majority
    leaver.close()
    master.pmgcm("delete", "3", "--yes")
    slave.start()
    nothing_kept(cluster, 3)
    assert "action=chain-lost origin=3" in slave.log("broker")
    stale = "SELECT count(*)::int FROM pmgsync.stale_table WHERE kind <> 'none'"
    eventually(lambda: slave.sql(stale) == [(0,)], what="all is fetched")
    cluster.wait()
    assert len(slave.content("mail")) > 15_000
    cluster.assert_equal(TABLES)
    wait_healthy(cluster)


@pytest.mark.campaign
def test_a_chain_is_kept_for_who_is_away_and_forgotten_by_who_was(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=4, schema=SCHEMA, profile=write_profile(tmp_path))
    master, slave, away, leaver = cluster.nodes
    leaver.sql("INSERT INTO mail VALUES (4, 1, 'known to all')")
    cluster.wait()
    away.stop()
    leaver.sql("INSERT INTO mail SELECT 4, n, n::text FROM generate_series(2, 50) AS n")
    eventually(lambda: [len(node.content("mail")) for node in (master, slave)] == [50, 50], what="two have it")
    leaver.stop()
    cluster.nodes.remove(leaver)
    # Three of four are a majority; the one that was away hears of it later.
    away_agent = partial(away.start, "agent")
    away.start("broker")
    master.pmgcm("delete", "4", "--yes")
    away.kill("broker")
    eventually(lambda: "node 3 was not heard" in alerts(master, 1), what="status says what is waited for")
    assert kept(master, 4)
    assert kept(slave, 4)
    # The master's services end while one of the two is done and the other is not.
    away.start("broker")
    away_agent()
    for _ in range(3):
        for node in (master, slave, away):
            node.kill("broker")
            node.start("broker")
            time.sleep(0.7)
    nothing_kept(cluster, 4)
    cluster.assert_equal(TABLES)
    wait_healthy(cluster)
    leaver.close()
