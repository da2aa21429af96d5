"""Every node of a gateway's cluster writes, against the rules and cut off from the others; all are equal in the end."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import psycopg2
import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.database import GATEWAY
from tests.harness.workload import Stoppable

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

NewCluster = Callable[..., Cluster]

SEED = 20240611
KEYS = 25
WRITE_S = 10.0
CUT_S = 4.0  # longer than a node may be silent
COMPARED = {
    "cgreylist": "*",
    "userprefs": "*",
    "cmsreceivers": "*",
    "cmailstore": "cid, rid, time, qtype, bytes, spamlevel, info, sender, header, file",
    "cstatistic": "cid, rid, time, bytes, direction, spamlevel, virusinfo, ptime, sender",
    "creceivers": "*",
    "localstat": "*",
    "rule": "*",
    "object": "*",
}
"""All columns but those that each node makes by itself."""

UPSERT_GREY = """
INSERT INTO cgreylist (ipnet, sender, receiver, instance, rctime, extime, delay, blocked, passed, cid, mtime)
VALUES (%s, 's', 'r', %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (ipnet, sender, receiver) DO UPDATE SET
instance = EXCLUDED.instance, rctime = EXCLUDED.rctime, extime = EXCLUDED.extime, delay = EXCLUDED.delay,
blocked = EXCLUDED.blocked, passed = EXCLUDED.passed, mtime = EXCLUDED.mtime"""


class Writer:
    """The gateway's programs on one node. Values are drawn from few, so that nodes meet, and may go back."""

    def __init__(self, node: Node, cid: int, seed: int) -> None:
        self._connection = psycopg2.connect(node.server.dsn(node.dbname))
        self._connection.autocommit = True
        self._pick = random.Random(seed)
        self._cid = cid
        self._mail = 0
        self.writes = 0

    def step(self) -> None:
        pick = self._pick
        kind = pick.choice((self.mail, self.grey, self.grey, self.prefs, self.click, self.click, self.purge))
        with self._connection.cursor() as cursor:
            kind(cursor)
            self.writes += max(cursor.rowcount, 0)
        time.sleep(0.005)

    def mail(self, cursor: psycopg2.extensions.cursor) -> None:
        self._mail += 1
        place = {"cid": self._cid, "rid": self._mail}
        cursor.execute(
            "INSERT INTO cmailstore (cid, rid, time, qtype, bytes, spamlevel, sender, header, file) "
            "VALUES (%(cid)s, %(rid)s, 1, 'S', 1, 1, E's\\xff', 'h', 'f'); "
            "INSERT INTO cmsreceivers (cmailstore_cid, cmailstore_rid, pmail, receiver, ticketid, status, mtime) "
            "SELECT %(cid)s, %(rid)s, 'p', 'r' || n, n, 'N', 1 FROM generate_series(1, 2) AS n; "
            "INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, ptime, sender) "
            "VALUES (%(cid)s, %(rid)s, 1, 1, true, 1, 1, 's'); "
            "INSERT INTO creceivers SELECT %(cid)s, %(rid)s, 'same', false FROM generate_series(1, 2); "
            "INSERT INTO localstat VALUES (%(rid)s %% 5, 1, 1, %(cid)s, 1) ON CONFLICT (time, cid) "
            "DO UPDATE SET rblcount = localstat.rblcount + 1",
            place,
        )

    def grey(self, cursor: psycopg2.extensions.cursor) -> None:
        pick = self._pick
        numbers = [pick.randrange(1000) for _ in range(5)]
        key = f"10.0.0.{pick.randrange(KEYS)}"
        instance = pick.choice((None, "a", "b"))
        cursor.execute(UPSERT_GREY, (key, instance, *numbers, self._cid, pick.randrange(1000)))

    def prefs(self, cursor: psycopg2.extensions.cursor) -> None:
        """A user is at home on one node, which makes and removes preferences; the others change them."""
        pick = self._pick
        number = pick.randrange(KEYS)
        key, data, mtime = f"user{number}", f"data{pick.randrange(50)}" * pick.choice((1, 900)), pick.randrange(1000)
        if number % 3 != self._cid % 3:
            cursor.execute("UPDATE userprefs SET data = %s, mtime = %s WHERE pmail = %s", (data, mtime, key))
        elif pick.random() < 0.2:
            cursor.execute("DELETE FROM userprefs WHERE pmail = %s", (key,))
        else:
            cursor.execute(
                "INSERT INTO userprefs VALUES (%s, 'WL', %s, %s) ON CONFLICT (pmail, name) "
                "DO UPDATE SET data = EXCLUDED.data, mtime = EXCLUDED.mtime",
                (key, data, mtime),
            )

    def click(self, cursor: psycopg2.extensions.cursor) -> None:
        pick = self._pick
        sets = (
            "status = 'D'", "status = 'N'", f"seen = 'S', seenmtime = {pick.randrange(100)}",
            f"seen = 'N', seenmtime = {pick.randrange(100)}", f"mtime = {pick.randrange(100)}",
        )  # fmt: skip
        cursor.execute(
            f"UPDATE cmsreceivers SET {pick.choice(sets)} WHERE cmailstore_cid = %s AND cmailstore_rid = %s",
            (pick.randint(1, 3), pick.randint(1, 30)),
        )

    def purge(self, cursor: psycopg2.extensions.cursor) -> None:
        """Greylisting expires on each node by itself, mails on the node that has them."""
        if self._pick.random() < 0.5:
            cursor.execute("DELETE FROM cgreylist WHERE ipnet = %s", (f"10.0.0.{self._pick.randrange(KEYS)}",))
        else:
            place = (self._cid, self._pick.randint(1, 60))
            cursor.execute("DELETE FROM cmsreceivers WHERE cmailstore_cid = %s AND cmailstore_rid = %s", place)

    def close(self) -> None:
        self._connection.close()


def content(node: Node, table: str) -> list[str]:
    """Return a table's rows, sorted; bytes that are no ASCII are escaped."""
    columns = COMPARED[table]
    rows = node.sql(f"SELECT encode(textsend(t::text), 'escape') FROM (SELECT {columns} FROM {table}) AS t")
    return sorted(row for (row,) in rows)


def differing(cluster: Cluster) -> list[str]:
    """Return the tables that are not the same everywhere."""
    first, *others = cluster.nodes
    return [table for table in COMPARED if any(content(node, table) != content(first, table) for node in others)]


def test_all_nodes_write_and_are_cut_off(new_cluster: NewCluster) -> None:
    print(f"seed {SEED}")
    cluster = new_cluster(nodes=3, profile="pmg", schema=GATEWAY.read_text(), encoding="SQL_ASCII")
    writers = [Writer(node, cid, SEED + cid) for cid, node in enumerate(cluster.nodes, 1)]
    threads = [Stoppable(writer.step) for writer in writers]
    try:
        for node in cluster.nodes[1:]:
            time.sleep(1)
            node.kill("broker", signal.SIGSTOP)
            cluster.master.sql("INSERT INTO rule (name, priority) VALUES ('r', 1)")
            time.sleep(CUT_S)
            node.kill("broker", signal.SIGCONT)
        time.sleep(max(0.0, WRITE_S - 2 * (1 + CUT_S)))
    finally:
        for thread in threads:
            thread.stop()
    # What one node has purged and another has not is no difference that would have to go; the next mail brings it back.
    for number in range(KEYS):
        cluster.master.sql(UPSERT_GREY, (f"10.0.0.{number}", "c", 1, 1, 1, 1, 1, 1, 1))
    cluster.wait()
    eventually(lambda: not differing(cluster), within_s=40, what="all nodes are equal")
    cluster.wait()
    assert differing(cluster) == []
    lost: Counter[str] = Counter()
    for node in cluster.nodes:
        for name, column, rule, count in node.sql(
            "SELECT name::text, column_name, rule, count(*) FROM pmgsync.conflict GROUP BY 1, 2, 3"
        ):
            lost[f"{name}.{column} {rule}"] += count
        assert not node.sql("SELECT 1 FROM pmgsync.stale_table")
    for writer in writers:
        writer.close()
    sizes = {table: len(content(cluster.master, table)) for table in COMPARED}
    print(f"writes {[writer.writes for writer in writers]}, rows in the end {sizes}")
    print("values that lost:", dict(sorted(lost.items())))
    rules = {f"cgreylist.{name}" for name in ("rctime", "extime", "blocked", "mtime")} | {"userprefs.data"}
    rules |= {"cmsreceivers.status", "cmsreceivers.seen", "cmsreceivers.mtime"}
    assert rules <= {name.split()[0] for name in lost}
    counted = cluster.master.status()["nodes"]
    assert all(node["conflicts"] and all(name.startswith("public.") for name in node["conflicts"]) for node in counted)
    assert min(writer.writes for writer in writers) > 100


def test_a_gateway_with_years_of_data_is_joined(new_cluster: NewCluster) -> None:
    """Rows from before there was a cluster become the master's; numbers that mean something here only are made here."""

    def fill(node: Node) -> None:
        node.sql("""
            SELECT setval('cstatistic_id_seq', 50000);
            INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, ptime, sender)
            SELECT 0, g, g, 1, true, 1, 1, E'\\xe4' FROM generate_series(1, 3000) AS g;
            INSERT INTO creceivers SELECT 0, g % 3000, 'same', false FROM generate_series(1, 6000) AS g;
            INSERT INTO cmailstore (cid, rid, time, qtype, bytes, spamlevel, sender, header, file)
            SELECT 0, g, 1, 'S', 1, 1, 's', 'h', 'f' FROM generate_series(1, 500) AS g;
            INSERT INTO cmsreceivers (cmailstore_cid, cmailstore_rid, pmail, ticketid, status, mtime)
            SELECT 0, g, 'p', g, 'N', 1 FROM generate_series(1, 500) AS g;
            INSERT INTO localstat SELECT g, 1, 1, 0, 1 FROM generate_series(1, 100) AS g;
            INSERT INTO statinfo VALUES ('lastid', 7, NULL);
            INSERT INTO userprefs VALUES ('p', 'WL', E'\\xff\\xfe', 1);
        """)

    cluster = new_cluster(nodes=2, profile="pmg", schema=GATEWAY.read_text(), encoding="SQL_ASCII", seed=fill)
    master, slave = cluster.nodes
    assert differing(cluster) == []
    assert (
        master.sql("SELECT DISTINCT cid FROM cstatistic") == slave.sql("SELECT DISTINCT cid FROM cmailstore") == [(1,)]
    )
    assert slave.sql("SELECT count(*), count(DISTINCT id) FROM cstatistic") == [(3000, 3000)]
    assert slave.sql("SELECT max(id) FROM cstatistic") < master.sql("SELECT max(id) FROM cstatistic")
    assert slave.content("statinfo") == []
    for cid, node in enumerate(cluster.nodes, 1):
        node.sql(
            f"INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, ptime, sender) "
            f"VALUES ({cid}, 9000, 1, 1, true, 1, 1, 's')"
        )
    master.sql("DELETE FROM cstatistic WHERE rid <= 10; UPDATE creceivers SET blocked = true WHERE cstatistic_rid = 5")
    cluster.wait()
    assert differing(cluster) == []
