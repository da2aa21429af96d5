"""Schemas that are apart for a while: one table waits, everything else keeps flowing, and in the end all is equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.database import GATEWAY

pytestmark = [pytest.mark.cluster, pytest.mark.campaign, pytest.mark.every_version]

NewCluster = Callable[..., Cluster]

FETCH_S = 30.0


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """Every table mirrored, each node's schema its own affair."""
    path = tmp_path / "separate.toml"
    path.write_text('name = "separate"\nall_tables = true\nddl = false\n')
    return str(path)


def stale(node: Node) -> dict[str, str]:
    """Return what is left out on a node: table and kind."""
    found = node.sql("SELECT name::text, kind FROM pmgsync.stale_table WHERE kind <> 'none'")
    return dict(found)


def apply_alerts(node: Node, cid: int) -> str:
    return " ".join(alert["text"] for alert in node.node_status(cid)["alerts"] if alert["kind"] == "stale")


def test_what_one_side_lacks_waits_and_is_fetched(new_cluster: NewCluster, profile: str) -> None:
    """Tables missing here, types that are narrower, columns that must not be NULL: each waits by itself."""
    cluster = new_cluster(
        nodes=2,
        profile=profile,
        schema="""
        CREATE TABLE flows (id int PRIMARY KEY);
        CREATE TABLE widened (id int PRIMARY KEY, v int);
        CREATE TABLE defaulted (id int PRIMARY KEY, v text);
        CREATE TABLE demanding (id int PRIMARY KEY, v text);
        """,
    )
    master, slave = cluster.nodes
    slave.sql("ALTER TABLE defaulted ADD extra text DEFAULT 'here'; ALTER TABLE demanding ADD extra text NOT NULL")
    master.sql("CREATE TABLE later (id int PRIMARY KEY, v text); INSERT INTO later VALUES (1, 'first')")
    master.sql("ALTER TABLE widened ALTER v TYPE bigint; INSERT INTO widened VALUES (1, 1), (2, 1 << 40)")
    master.sql("INSERT INTO widened VALUES (3, 5000000000); INSERT INTO flows VALUES (1)")
    master.sql("INSERT INTO defaulted VALUES (1, 'v'); INSERT INTO demanding VALUES (1, 'v')")
    master.sql("INSERT INTO flows VALUES (2); INSERT INTO later VALUES (2, 'second')")
    cluster.wait()
    cluster.assert_equal(["flows"])
    assert slave.sql("SELECT extra FROM defaulted") == [("here",)]
    assert stale(slave) == {"later": "table", "widened": "table", "demanding": "table"}
    eventually(lambda: "public.later" in apply_alerts(slave, 2), what="an alert that names the table")
    slave.sql("CREATE TABLE later (id int PRIMARY KEY, v text); ALTER TABLE widened ALTER v TYPE bigint")
    slave.sql("ALTER TABLE demanding ALTER extra SET DEFAULT 'x'")
    for number in range(10, 40):  # the chain goes on while the tables are fetched
        master.sql(f"INSERT INTO later VALUES ({number}, 'more'); UPDATE widened SET v = v + 1")
    eventually(lambda: not stale(slave), within_s=FETCH_S, what="the tables are fetched")
    master.sql("INSERT INTO later VALUES (50, 'last'); DELETE FROM widened WHERE id = 1")
    cluster.wait()
    cluster.assert_equal(["flows", "later", "widened"])
    cluster.assert_equal(["defaulted", "demanding"], "id, v")
    eventually(lambda: not slave.sql("SELECT 1 FROM pmgsync.stale_table"), what="nothing is remembered in the end")


def test_altered_in_the_middle_of_a_transaction(new_cluster: NewCluster, profile: str) -> None:
    cluster = new_cluster(
        nodes=2,
        profile=profile,
        schema="""
        CREATE TABLE flows (id int PRIMARY KEY);
        CREATE TABLE t (id int PRIMARY KEY, a text, b text);
        CREATE TABLE made (id int PRIMARY KEY, v text);
        INSERT INTO made VALUES (1, 'old'), (2, 'old');
        """,
    )
    master, slave = cluster.nodes
    master.sql("INSERT INTO made VALUES (3, 'old')")
    master.sql("""
        INSERT INTO t VALUES (1, 'a', 'b'); ALTER TABLE t ADD c text; INSERT INTO t VALUES (2, 'a', 'b', 'c');
        ALTER TABLE t DROP a; UPDATE t SET b = 'B', c = 'C'; ALTER TABLE t RENAME b TO d;
        INSERT INTO t (id, d, c) VALUES (3, 'd', 'c'); INSERT INTO flows VALUES (1)
    """)
    # What the new table holds was never in the old one.
    master.sql("""
        ALTER TABLE made RENAME TO made_before; CREATE TABLE made (id int PRIMARY KEY, v text);
        INSERT INTO made VALUES (2, 'new'); INSERT INTO flows VALUES (2)
    """)
    master.sql("INSERT INTO made VALUES (9, 'new')")
    cluster.wait()
    cluster.assert_equal(["flows"])
    eventually(lambda: slave.content("made") == master.content("made"), within_s=FETCH_S, what="made is fetched")
    assert stale(slave) == {"t": "columns"}
    slave.sql("ALTER TABLE t DROP a; ALTER TABLE t ADD c text; ALTER TABLE t RENAME b TO d")
    eventually(lambda: not stale(slave), within_s=FETCH_S, what="t is fetched")
    master.sql("UPDATE t SET d = d || '!'; INSERT INTO made VALUES (10, 'new')")
    cluster.wait()
    cluster.assert_equal(["flows", "made"])
    cluster.assert_equal(["t"], "id, c, d")


def test_a_data_error_is_no_drift(new_cluster: NewCluster, profile: str) -> None:
    cluster = new_cluster(
        nodes=2, profile=profile, schema="CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE u (id int)"
    )
    master, slave = cluster.nodes
    slave.sql("ALTER TABLE t ADD CHECK (v < 10)")
    master.sql("INSERT INTO t VALUES (1, 99)")
    eventually(lambda: "cannot be applied in public.t" in (slave.node_status(2)["error"] or ""))
    assert slave.node_status(2)["state"] == "ERROR" and not stale(slave)
    slave.sql("ALTER TABLE t DROP CONSTRAINT t_v_check")
    cluster.wait()
    cluster.assert_equal(["t"])


def test_a_rolling_upgrade_of_the_gateway(new_cluster: NewCluster) -> None:
    """Two columns of cmsreceivers come with a package upgrade: first on the master, much later on a node."""
    cluster = new_cluster(nodes=2, profile="pmg", schema=GATEWAY.read_text(), encoding="SQL_ASCII")
    master, slave = cluster.nodes
    # Preflight demands the columns; a node that was downgraded looks like one that was not upgraded yet.
    slave.sql("ALTER TABLE cmsreceivers DROP seen, DROP seenmtime")
    mail = (
        "INSERT INTO cmailstore (cid, rid, time, qtype, bytes, spamlevel, sender, header, file) "
        "VALUES ({0}, {1}, 1, 'S', 1, 1, 's', 'h', 'f'); INSERT INTO cmsreceivers (cmailstore_cid, cmailstore_rid, "
        "pmail, ticketid, status, mtime) VALUES ({0}, {1}, 'p', {1}, 'N', 1)"
    )
    for number in range(1, 6):
        master.sql(mail.format(1, number))
        slave.sql(mail.format(2, number))
    cluster.wait()
    master.sql("UPDATE cmsreceivers SET seen = 'S', seenmtime = 100, mtime = 5 WHERE cmailstore_rid <= 3")
    slave.sql("UPDATE cmsreceivers SET status = 'D', mtime = 6 WHERE cmailstore_rid = 2")
    cluster.wait()
    shared = "cmailstore_cid, cmailstore_rid, pmail, ticketid, status, mtime"
    cluster.assert_equal(["cmsreceivers"], shared)
    assert stale(slave) == {"cmsreceivers": "columns"}
    slave.sql("""ALTER TABLE cmsreceivers ADD seen "char" NOT NULL DEFAULT 'N', ADD seenmtime int NOT NULL DEFAULT 0""")
    eventually(lambda: not stale(slave), within_s=FETCH_S, what="the missed values are fetched")
    slave.sql("UPDATE cmsreceivers SET seen = 'N', seenmtime = 200 WHERE cmailstore_rid = 3")
    cluster.wait()
    cluster.assert_equal(["cmsreceivers"], f"{shared}, seen, seenmtime")
    assert slave.sql("SELECT count(*) FROM cmsreceivers WHERE seen = 'S'") == [(4,)]
