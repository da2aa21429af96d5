"""A row that names a file of a spool is readable on another node when the file is, or after a while without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psycopg2
import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.network import Network

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]

PROFILE = """
name = "mails"

[tables.mail]
policy = "owned"
owner = "cid"

[tables.rule]
policy = "mirror"

[tables.statistic]
policy = "owned"
owner = "cid"

[[files]]
kind = "spool"
root = "/var/spool/gateway"
setting = "spool_root"
tree = "cluster/{cid}"
include = ["spam/"]
named_in = ["mail.file"]
"""
SCHEMA = """
CREATE TABLE mail (cid int, rid int, file text, header text, PRIMARY KEY (cid, rid));
CREATE TABLE statistic (cid int, rid int, PRIMARY KEY (cid, rid));
CREATE TABLE rule (id int PRIMARY KEY);
"""
EXTRA = '[files]\nspool_root = "{directory}/spool"\nrow_wait_s = {wait_s}'


def mails(new_cluster: NewCluster, tmp_path: Path, wait_s: int, namespaces: Sequence[str] = ()) -> Cluster:
    profile = tmp_path / "mails.toml"
    profile.write_text(PROFILE)
    cluster = new_cluster(
        nodes=2,
        profile=str(profile),
        extra=EXTRA.replace("{wait_s}", str(wait_s)),
        schema=SCHEMA,
        namespaces=namespaces,
    )
    # Both have the spool's directory before the first mail.
    for number, node in enumerate(cluster.nodes, 1):
        write(node, number, 0)
        for other in cluster.nodes:
            eventually((other.directory / "spool" / name(number, 0)).exists)
    return cluster


def name(owner: int, rid: int) -> str:
    return f"cluster/{owner}/spam/{rid % 16:02x}/{rid}"


def write(node: Node, owner: int, rid: int) -> None:
    """Write a mail's file as the gateway does."""
    path = node.directory / "spool" / name(owner, rid)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"%d\n" % rid * 3000)


def insert(node: Node, owner: int, rid: int, header: str = "") -> None:
    node.sql("INSERT INTO mail VALUES (%s, %s, %s, %s)", (owner, rid, name(owner, rid), header))


class Reader(threading.Thread):
    """Reads mails as soon as their rows are there, and looks for their files.

    Attributes:
        without: rids whose file was not there when the row was read.
        seen: when each row was read first.
    """

    def __init__(self, node: Node, owner: int) -> None:
        super().__init__(daemon=True)
        self.without: list[int] = []
        self.seen: dict[int, float] = {}
        self.over = threading.Event()
        self._node, self._owner = node, owner

    def reach(self, rid: int) -> None:
        """Wait until a row was read."""
        eventually(lambda: rid in self.seen)

    def finish(self, count: int) -> None:
        """End when so many rows were read."""
        try:
            eventually(lambda: len(self.seen) == count)
        finally:
            self.over.set()
            self.join()

    def run(self) -> None:
        connection = psycopg2.connect(self._node.server.dsn(self._node.dbname))
        connection.autocommit = True
        with connection.cursor() as cursor:
            while not self.over.is_set():
                newest = max(self.seen, default=-1)
                cursor.execute("SELECT rid, file FROM mail WHERE cid = %s AND rid > %s", (self._owner, newest))
                now = time.monotonic()
                for rid, file in sorted(cursor.fetchall()):
                    self.seen[rid] = now
                    if not (self._node.directory / "spool" / file).exists():
                        self.without.append(rid)
                time.sleep(0.001)
        connection.close()


def test_a_row_is_never_read_before_its_file(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = mails(new_cluster, tmp_path, 30)
    master, other = cluster.nodes
    readers = [Reader(other, 1), Reader(master, 2)]
    for reader in readers:
        reader.start()
    for rid in range(1, 61):
        for owner, node in enumerate(cluster.nodes, 1):
            write(node, owner, rid)
            insert(node, owner, rid, header="h" * 200_000 if rid == 40 else "")  # a transaction of several parts
        time.sleep(0.01 if rid % 20 else 0.5)
    for reader in readers:
        reader.finish(60)
        assert reader.without == []
    # A row whose file comes after it.
    insert(master, 1, 200)
    master.sql("INSERT INTO rule VALUES (1)")
    time.sleep(0.5)
    assert "(200)" not in other.content("mail", "rid")
    assert other.content("rule") == [], "what follows a row on its chain waits with it"
    insert(other, 2, 201)  # the chain of another node goes on meanwhile
    write(other, 2, 201)
    eventually(lambda: "(201)" in master.content("mail", "rid"))
    write(master, 1, 200)
    eventually(lambda: "(200)" in other.content("mail", "rid"))
    eventually(lambda: other.content("rule") == ["(1)"])


@pytest.mark.campaign
def test_after_a_cut_rows_do_not_overtake_their_files(
    new_cluster: NewCluster, new_network: Callable[[int], Network], tmp_path: Path
) -> None:
    links = new_network(2)
    cluster = mails(new_cluster, tmp_path, 30, namespaces=links.names)
    master, other = cluster.nodes
    reader = Reader(other, 1)
    reader.start()
    rid = 0
    for cut_s in (1, 12):
        links.cut(2)
        until = time.monotonic() + cut_s
        while time.monotonic() < until:
            rid += 1
            write(master, 1, rid)
            insert(master, 1, rid)
            time.sleep(0.05)
        links.heal(2)
        healed = time.monotonic()
        reader.reach(rid)
        print(f"{rid} mails are readable {time.monotonic() - healed:.1f} s after a cut of {cut_s} s")
    reader.finish(rid)
    assert reader.without == []


@pytest.mark.campaign
def test_a_row_goes_on_without_a_file_that_does_not_come(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = mails(new_cluster, tmp_path, 4)
    master, other = cluster.nodes
    # No file of the cluster's trees: from before there was a cluster, not selected, impossible. They do not wait, nor
    # are they told of.
    for rid, file in enumerate(["spam/00/old", "cluster/1/other/x", "cluster/1/../../etc/passwd", "/etc/passwd", ""]):
        master.sql("INSERT INTO mail VALUES (1, %s, %s, '')", (1000 + rid, file))
    cluster.wait()
    # Mails whose files their owner has removed already, as a node meets them that was away.
    started = time.monotonic()
    master.sql("INSERT INTO mail SELECT 1, i, 'cluster/1/spam/gone/' || i, '' FROM generate_series(2000, 2500) i")
    for rid in range(3000, 3050):
        insert(master, 1, rid)
    cluster.wait()
    # Four seconds once, and then a tenth of the time: not for each of them.
    assert 3 < time.monotonic() - started < 60
    assert len(other.content("mail", "rid")) == 5 + 501 + 50
    told = eventually(lambda: [a["text"] for a in master.node_status(2)["alerts"] if a["kind"] == "files"])
    assert "551 rows of node 1 are shown without their files; the newest is cluster/1/spam/" in told[0]
    for rid in range(3000, 3050):
        write(master, 1, rid)
    eventually(lambda: [a for a in master.node_status(2)["alerts"] if "501 rows" in a["text"]])
    assert master.node_status(2)["state"] == "A"
