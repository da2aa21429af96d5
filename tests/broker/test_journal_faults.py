"""What a crash or a bad disk does to a journal, on a whole cluster: nothing is lost, wherever the only copy was."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import STANDARD

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]
NewCluster = Callable[..., Cluster]


def cut(count: int) -> Callable[[Path], None]:
    """Return the damage that takes the last bytes of a file away."""
    return lambda path: os.truncate(path, path.stat().st_size - count)


def zero(count: int) -> Callable[[Path], None]:
    """Return the damage that leaves zeros at the end, as a file system does whose data came later than its length."""

    def damage(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, size - count)
        os.truncate(path, size)

    return damage


def flip(path: Path) -> None:
    """Flip a bit in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "1 byte cut": cut(1),
    "7 bytes cut": cut(7),
    "100 bytes cut": cut(100),
    "9000 bytes cut": cut(9000),
    "7 zeros": zero(7),
    "9000 zeros": zero(9000),
    "a bit flipped": flip,
}


def _journal(node: Node) -> Path:
    return max((node.directory / "state" / "journal").glob("1-*.db"), key=lambda path: path.stat().st_mtime)


def _end(node: Node) -> int:
    """Return the LSN that a node's journal of chain 1 ends at, on disk."""
    with contextlib.closing(sqlite3.connect(f"file:{_journal(node)}?mode=ro", uri=True)) as journal:
        return int(journal.execute("SELECT coalesce(max(lsn), 0) FROM frame").fetchone()[0])


def _confirmed(node: Node) -> int:
    return parse_lsn(node.sql("SELECT confirmed_flush_lsn::text FROM pg_replication_slots")[0][0])


@pytest.mark.parametrize("where", ["log", "file"])
@pytest.mark.parametrize("victim", ["master", "slave"])
def test_a_damaged_end_or_middle_loses_nothing(new_cluster: NewCluster, victim: str, where: str) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    node = master if victim == "master" else slave
    done = []
    for number, (name, damage) in enumerate(DAMAGES.items()):
        # A broker that begins with an empty log: its end is what was written last.
        node.stop()
        node.start()
        cluster.wait()
        # What follows is in the victim's journal alone: no longer in the slot, or not yet in the slave's database.
        slave.kill("agent")
        if node is master:
            slave.kill("broker")
        for turn in range(20):
            low = (number * 20 + turn) * 100
            master.sql("INSERT INTO t SELECT g, repeat('x', 90) FROM generate_series(%s, %s) AS g", (low, low + 99))
        master.sql("UPDATE t SET v = %s WHERE id %% 50 = 0", (name,))
        head = parse_lsn(master.sql("SELECT pg_current_wal_lsn()::text")[0][0])
        eventually(lambda: _confirmed(master) >= head, what="the slot is confirmed")  # noqa: B023
        eventually(lambda: _end(node) >= _end(master), what="the journal has everything")
        path = _journal(node)
        if where == "log":
            node.kill("broker")
            path = path.with_name(path.name + "-wal")
        else:
            node.processes["broker"].terminate()
            assert node.processes["broker"].wait(15) == 0
        assert path.stat().st_size > 10_000
        damage(path)
        breaks, resyncs = (master.log("agent").count("chain-broken"), slave.log("agent").count("action=resync "))
        node.start()
        slave.start()
        cluster.wait()
        cluster.assert_equal(["t"])
        breaks = master.log("agent").count("chain-broken") - breaks
        resyncs = slave.log("agent").count("action=resync ") - resyncs
        assert name != "nothing" or breaks == resyncs == 0, "a broker that only stopped has lost nothing"
        done.append(f"{name}: {breaks} chains broken, {resyncs} resynchronised")
    print(f"{victim}'s {where}: " + "; ".join(done))
    if where == "file":
        # A torn log is what every crash may leave; a torn file is not.
        assert "action=journal-damaged" in node.log("broker")
