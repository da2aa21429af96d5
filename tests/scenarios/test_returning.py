"""A master that returns: what it wrote past the fork is exported, and it ends as a slave in sync, by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from pmgsync.divergence_files import DivergenceFiles
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.epochs import promote
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


def in_sync(cluster: Cluster, node: Node, within_s: float = 60.0) -> None:
    """Wait until a node is in state A and nothing is pending on it, and compare all tables."""

    def done() -> bool:
        return not DivergenceFiles(node.state_dir).pending() and all(
            each["state"] == "A" for each in node.status()["nodes"]
        )

    eventually(done, within_s=within_s, what=f"{node.name} is a slave in sync")
    cluster.wait(node=node)
    stale = "SELECT count(*)::int FROM pmgsync.stale_table WHERE kind <> 'none'"
    eventually(lambda: all(each.sql(stale) == [(0,)] for each in cluster.nodes), what="all is fetched")
    cluster.wait(node=node)
    cluster.assert_equal([*BANK_TABLES, "t"])


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
    one.start()
    in_sync(cluster, one)
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
    modes = [path.stat().st_mode & 0o777 for path in Path(one.state_dir / "divergence").iterdir()]
    assert modes == [0o600] and (one.state_dir / "divergence").stat().st_mode & 0o777 == 0o700
