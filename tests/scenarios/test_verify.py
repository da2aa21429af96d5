"""`pmgcm verify` on a cluster that was damaged on purpose: it finds exactly that, and has it put right."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.scenarios.test_files import Files, arrives, large

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]


@pytest.mark.campaign
def test_what_was_damaged_is_found_and_repaired_and_nothing_else(new_cluster: NewCluster, tmp_path: Path) -> None:
    files = Files(new_cluster, tmp_path, 3)
    cluster = files.cluster
    master, second = cluster.master, cluster.nodes[1]
    master.sql("INSERT INTO loose VALUES (1, 'x'), (1, 'x'), (2, NULL)")
    # More rows than are looked at together, and nobody has counted them yet.
    master.sql("INSERT INTO t SELECT generate_series(1, 60000)")
    master.sql("INSERT INTO named SELECT g, 'row ' || g FROM generate_series(1, 500) AS g")
    large(files.spool(3, 3) / "virus/sample", 2 << 20, 1)
    arrives(files.spool(3, 3), files.spool(2, 3), files.spool(1, 3))
    arrives(files.spool(1, 1), files.spool(2, 1), files.spool(3, 1))
    cluster.wait()
    whole = master.pmgcm("verify", "--json", "--share", "100")
    assert json.loads(whole.stdout)["same"]

    # A row changed, one gone, one too many, one of two equal ones gone; a byte of a file flipped, its times set back.
    second.sql(
        "SET session_replication_role = replica; UPDATE named SET name = 'damaged' WHERE id = 7;"
        "DELETE FROM t WHERE id = 59999; INSERT INTO named VALUES (9999, 'extra');"
        "DELETE FROM loose WHERE ctid = (SELECT min(ctid) FROM loose WHERE a = 1)"
    )
    sample = files.spool(2, 3) / "virus/sample"
    times = sample.stat()
    with sample.open("r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(sample, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Rows and files that come and go meanwhile are no differences.
    stop = threading.Event()

    def write() -> None:
        number = 100_000
        while not stop.is_set():
            number += 1
            master.sql("INSERT INTO t VALUES (%s)", (number,))
            (files.spool(1, 1) / f"spam/{number}").write_text(str(number))
            stop.wait(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = json.loads(master.pmgcm("verify", "--json", "--share", "100", check=False).stdout)
    finally:
        stop.set()
        writer.join()
    assert found["problems"] == []
    rows = {
        (table["table"], each["key"], each["cid"], each["source"], each["kind"])
        for table in found["differing_tables"]
        for each in table["differences"]
    }
    assert rows == {
        ("public.named", "(7)", 2, 1, "differs"),
        ("public.named", "(9999)", 2, 1, "extra"),
        ("public.t", "(59999)", 2, 1, "missing"),
        ("public.loose", "(1,x)", 2, 1, "differs"),
    }
    assert found["differing_trees"] == [
        {
            "tree": "/var/spool/gateway/cluster/3",
            "differences": [{"name": "virus/sample", "cid": 2, "source": 3, "kind": "differs"}],
        }
    ]
    repaired = cluster.nodes[2].pmgcm("verify", "--repair", "--share", "100")
    assert "the same on all nodes" in repaired.stdout
    cluster.assert_equal(["t", "named", "loose"])
    arrives(files.spool(3, 3), files.spool(2, 3))
