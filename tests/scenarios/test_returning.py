"""A master that returns: what it wrote past the fork is exported, and it ends as a slave in sync, by itself."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pmgsync.divergence_files import DivergenceFiles
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.command_line import refused
from tests.harness.epochs import applied, held, own_end, promote
from tests.harness.ledger import SCHEMA, TABLES, Ledger, Outcome, balance, write_profile
from tests.harness.schema import BANK_TABLES, STANDARD

pytestmark = pytest.mark.cluster


def exported(node: Node) -> list[dict[str, Any]]:
    """Return the changes in a node's divergence files, once nothing is pending."""
    files = DivergenceFiles(node.state_dir)
    found = []
    for name in files.names():
        files.read(name)
        lines = [json.loads(line) for line in files.export_path(name).read_text().splitlines()]
        found += lines[1:-1]
    return found


def opened(node: Node) -> Callable[[], bool]:
    def is_open() -> bool:
        try:
            node.sql("INSERT INTO t VALUES (1000, 'opened') ON CONFLICT (id) DO UPDATE SET v = 'opened'")
        except psycopg2.errors.ReadOnlySqlTransaction:
            return False
        return True

    return is_open


def in_sync(cluster: Cluster, node: Node, within_s: float = 60.0, tables: Sequence[str] = (*BANK_TABLES, "t")) -> None:
    """Wait until a node is in state A and nothing is pending on it, and compare all tables."""

    begun = time.monotonic()
    eventually(partial(is_in_step, cluster, node), within_s=within_s, what=f"{node.name} is a slave in sync")
    print(f"{node.name} was a slave in sync after {time.monotonic() - begun:.1f} s")
    cluster.wait(node=node)
    stale = "SELECT count(*)::int FROM pmgsync.stale_table WHERE kind <> 'none'"
    eventually(lambda: all(each.sql(stale) == [(0,)] for each in cluster.nodes), what="all is fetched")
    cluster.wait(node=node)
    cluster.assert_equal(tables)


@pytest.mark.campaign
def test_a_master_whose_database_never_stopped(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    one, two = cluster.nodes
    one.sql("INSERT INTO t SELECT n, 'both' FROM generate_series(1, 20) AS n")
    cluster.wait()
    one.kill("agent")
    one.kill("broker")
    one.sql("INSERT INTO t SELECT n, 'late' FROM generate_series(21, 30) AS n")
    one.sql("UPDATE t SET v = 'changed' WHERE id = 1; DELETE FROM t WHERE id = 2; INSERT INTO loose VALUES (1, 'x')")
    promote(two, before=one, voters=[one, two])
    eventually(opened(two), what="the new master takes writes")
    two.sql("INSERT INTO t VALUES (21, 'of the new master'); UPDATE t SET v = 'new' WHERE id = 3")
    two.sql("UPDATE account SET balance = balance + 1 WHERE id = 1")
    one.sql("INSERT INTO t VALUES (31, 'later still')")
    began = len(one.log("agent"))
    one.start()
    in_sync(cluster, one)
    learnt = next(line for line in one.log("broker").splitlines() if "action=document cid=1 epoch=2" in line)
    published = next(line for line in one.log("agent")[began:].splitlines() if "action=capture" in line)
    assert learnt[:23] < published[:23], "it learns of the epoch before it publishes"
    done = [(each["kind"], each["table"][1], each["key"].get("id") or each["new"]["b"]) for each in exported(one)]
    inserted = [("insert", "t", str(n)) for n in range(21, 31)]
    assert done == [
        *inserted,
        ("update", "t", "1"),
        ("delete", "t", "2"),
        ("insert", "loose", "x"),
        ("insert", "t", "31"),
    ]
    assert exported(two) == []
    texts = [alert["text"] for node in one.status()["nodes"] if node["cid"] == 1 for alert in node["alerts"]]
    assert any("pmgcm divergence" in text for text in texts)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        one.sql("INSERT INTO t VALUES (99, 'no')")
    closed_up(one)
    name = show_and_make_again(one, two)
    cluster.wait(node=two)
    cluster.assert_equal([*BANK_TABLES, "t"])
    assert one.pmgcm("divergence", "drop", name, "--yes").stdout == f"{name} was removed\n"
    assert one.pmgcm("divergence", "list").stdout == "nothing has diverged on this node\n"


@pytest.mark.campaign
def test_a_slave_that_is_ahead_of_the_new_master(new_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path))
    one, two, three = cluster.nodes
    one.sql("INSERT INTO configuration (key) VALUES ('all')")
    eventually(partial(all_are_members, cluster), what="all are members, and know it")
    cluster.wait()
    two.stop()
    one.sql("INSERT INTO configuration (key) VALUES ('ahead'); INSERT INTO mail VALUES (1, 1, 'ahead')")
    eventually(lambda: three.content("mail", "key") == ["(ahead)"], what="the third node is ahead")
    three.sql("INSERT INTO mail VALUES (3, 1, 'own')")
    for node in (one, three):
        node.stop()
    one.sql("INSERT INTO configuration (key) VALUES ('late'); INSERT INTO mail VALUES (1, 2, 'late')")
    two.start()
    promote(two, before=one, voters=[one, two, three])
    three.start()
    one.start()

    def written() -> bool:
        try:
            two.sql("INSERT INTO configuration (key) VALUES ('new')")
        except psycopg2.errors.ReadOnlySqlTransaction:
            return False
        return True

    eventually(written, what="the new master takes writes")
    in_sync(cluster, three, tables=TABLES)
    in_sync(cluster, one, tables=TABLES)
    assert one.content("configuration", "key") == ["(all)", "(new)"]
    assert one.content("mail", "key") == ["(ahead)", "(late)", "(own)"]
    assert keys(three) == ["ahead"] and keys(one) == ["ahead", "late"] and keys(two) == []


def keys(node: Node) -> list[str]:
    return [each["new"]["key"] for each in exported(node)]


@pytest.mark.campaign
@pytest.mark.parametrize("nodes", [2, 3])
def test_there_and_back_again_while_clients_go_on(
    new_cluster: Callable[..., Cluster], tmp_path: Path, nodes: int
) -> None:
    cluster = new_cluster(nodes=nodes, schema=SCHEMA, profile=write_profile(tmp_path))
    one, two = cluster.nodes[:2]
    eventually(partial(all_are_members, cluster), what="all are members, and know it")
    with Ledger(cluster) as ledger:
        for master, other, cid in ((two, one, 2), (one, two, 1)):
            before = 3 - cid
            begun = time.time()
            eventually(partial(ledger.acknowledged_since, before, begun), what="the master takes writes")
            other.kill("agent")
            other.kill("broker")
            count = len(ledger.of("mail", Outcome.ACKNOWLEDGED, before))
            eventually(partial(more_mail, ledger, before, count + 20), what="its database goes on")
            promote(master, before=other, voters=cluster.nodes)
            begun = time.time()
            other.start()
            eventually(partial(ledger.acknowledged_since, cid, begun), what="the new master takes writes")
            returned(cluster, other)
    in_sync(cluster, one, tables=TABLES)
    account = balance(cluster, ledger, {key for node in cluster.nodes for key in keys(node)})
    print(account)
    assert account.lost == () and account.exported > 0


def all_are_members(cluster: Cluster) -> bool:
    found = [held(node).document for node in cluster.nodes]
    return len(set(found)) == 1 and not found[0].joining and (len(cluster.nodes) < 3 or found[0].fence == "lease")


def more_mail(ledger: Ledger, cid: int, count: int) -> bool:
    return len(ledger.of("mail", Outcome.ACKNOWLEDGED, cid)) > count


def is_in_step(cluster: Cluster, node: Node) -> bool:
    """Return True when a node knows the newest epoch, has worked off what does not count, and all are well."""
    histories = {held(each).document.history for each in cluster.nodes}
    well = len(histories) == 1 and not DivergenceFiles(node.state_dir).pending()
    return well and all(each["state"] == "A" for each in node.status()["nodes"])


def returned(cluster: Cluster, node: Node) -> None:
    """Wait until a node is a slave in sync."""
    eventually(partial(is_in_step, cluster, node), what=f"{node.name} is a slave in sync")


@pytest.mark.campaign
def test_a_journal_that_is_lost_is_said_to_be(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    one, two = cluster.nodes
    one.sql("INSERT INTO t SELECT n, 'both' FROM generate_series(1, 20) AS n")
    cluster.wait()
    one.stop()
    one.sql("INSERT INTO t VALUES (21, 'late'); UPDATE loose SET a = 5; DELETE FROM account WHERE id = 3")
    promote(two, before=one, voters=[one, two])
    eventually(opened(two), what="the new master takes writes")
    shutil.rmtree(one.state_dir / "journal")
    one.start()
    in_sync(cluster, one)
    (file,) = json.loads(one.pmgcm("divergence", "list", "--json").stdout)["files"]
    assert "the journal has nothing" in file["missing"] and file["changes"] == 0
    texts = [alert["text"] for alert in one.node_status(1)["alerts"] if alert["kind"] == "divergence"]
    assert any("the journal has nothing" in text for text in texts)


@pytest.mark.campaign
def test_killed_while_it_exports(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    one, two = cluster.nodes
    one.kill("agent")
    one.kill("broker")
    one.sql("INSERT INTO t SELECT n, repeat('late', 20) FROM generate_series(1, 20000) AS n")
    one.sql("INSERT INTO t VALUES (50000, 'last')")
    promote(two, before=one, voters=[one, two])
    eventually(opened(two), what="the new master takes writes")
    one.start()
    pick, kills = random.Random(7), 0
    files = DivergenceFiles(one.state_dir)
    eventually(files.pending, what="a stretch is noted")
    while files.pending() and kills < 12:
        what = pick.choice(["divergence", "apply:2", "broker"])
        worker = one.workers().get(what)
        if worker is not None:
            worker.kill()
        elif what == "broker":
            one.kill("broker")
            one.start()
        kills += 1
        time.sleep(pick.uniform(0.1, 0.8))
    in_sync(cluster, one)
    assert [each["new"]["id"] for each in exported(one)] == [*map(str, range(1, 20001)), "50000"]
    assert kills > 0


@pytest.mark.campaign
def test_two_sides_that_were_forced_meet_and_one_is_decided_for(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    one, two, three = cluster.nodes
    one.sql("INSERT INTO t SELECT n, 'all' FROM generate_series(1, 10) AS n")
    cluster.wait()
    for node in (one, three):
        node.stop()
    promote(two, before=one, voters=[], forced=True, by=three)
    eventually(opened(two), what="the first side takes writes")
    two.sql("INSERT INTO t VALUES (100, 'two'); UPDATE t SET v = 'two' WHERE id = 1")
    two.stop()
    three.start()
    promote(three, before=one, voters=[], forced=True, by=two)
    eventually(opened(three), what="the second side takes writes")
    three.sql("INSERT INTO t VALUES (200, 'three'); DELETE FROM t WHERE id = 2")
    two.start()

    def both_say_so() -> bool:
        return all("split" in (each.node_status(cid)["error"] or "") for each, cid in ((two, 2), (three, 3)))

    eventually(both_say_so, what="both sides say that the cluster is split")
    two.sql("INSERT INTO t VALUES (101, 'two')")
    three.sql("INSERT INTO t VALUES (201, 'three')")
    passed = {node.name: own_end(node).lsn for node in (two, three)}

    def exchanged() -> bool:
        # Something after it is needed, for what is left out moves a position only with the next frame.
        return applied(three, 2).lsn >= passed["node2"] - 2000 and applied(two, 3).lsn >= passed["node3"] - 2000

    eventually(exchanged, what="each has looked at what the other wrote")
    assert ids(two) == [*range(1, 11), 100, 101, 1000] and ids(three) == [1, *range(3, 11), 200, 201, 1000]
    refused(two.pmgcm("decide", check=False), "--yes")
    assert "master of epoch 3" in three.pmgcm("decide", "--yes").stdout
    one.start()
    in_sync(cluster, three)
    assert ids(two) == ids(three) == ids(one)
    found = [(each["kind"], each["new"]["id"]) for each in exported(two)]
    assert [one for one in found if one[1] != "1000"] == [("insert", "100"), ("update", "1"), ("insert", "101")]
    assert exported(three) == [] and "split" not in three.pmgcm("status").stdout
    refused(three.pmgcm("decide", "--yes", check=False), "nothing is to be decided")


def ids(node: Node) -> list[int]:
    return [number for (number,) in node.sql("SELECT id FROM t ORDER BY id")]


def show_and_make_again(one: Node, two: Node) -> str:
    (file,) = json.loads(one.pmgcm("divergence", "list", "--json").stdout)["files"]
    name = str(file["id"])
    assert (file["changes"], file["tables"], file["missing"]) == (14, ["public.loose", "public.t"], "")
    assert f"{name}  14 changes of node 1" in one.pmgcm("divergence", "list").stdout
    assert "delete public.t (id=2)" in one.pmgcm("divergence", "show", name).stdout
    assert len(one.pmgcm("divergence", "show", name, "--json").stdout.splitlines()) == 16
    refused(one.pmgcm("divergence", "replay", name, check=False), "not permitted (not master)")
    refused(one.pmgcm("divergence", "show", "1-2-3", check=False), "no divergence '1-2-3'", "divergence list")
    refused(one.pmgcm("divergence", "drop", name, check=False), "--yes")
    replayed = two.pmgcm("divergence", "replay", name, check=False)
    assert replayed.returncode == 1 and "11 changes made, 3 not made" in replayed.stdout
    assert "conflict: insert public.t (id=21)" in replayed.stdout and "of the new master" in replayed.stdout
    assert two.content("t", "id, v").count('(21,"of the new master")') == 1
    again = json.loads(two.pmgcm("divergence", "replay", name, "--force", "--json").stdout)
    assert again["outcomes"] == {"forced": 3, "there": 11}
    return name


def closed_up(one: Node) -> None:
    modes = [path.stat().st_mode & 0o777 for path in Path(one.state_dir / "divergence").iterdir()]
    assert modes == [0o600] and (one.state_dir / "divergence").stat().st_mode & 0o777 == 0o700
