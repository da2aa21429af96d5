"""What may go wrong with databases, slots, disks and processes: each ends equal, or in the loud state it should."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable

import psutil
import psycopg2
import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Node, eventually
from tests.harness.health import NewCluster, alerts, confirmed_lsn, wait_healthy
from tests.harness.network import Network
from tests.harness.schema import BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable, Witness

pytestmark = pytest.mark.cluster


RSS_LIMIT = 256 << 20
NewNetwork = Callable[[int], Network]


# -- slots and restored data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "remake", [pytest.param(False, id="dropped", marks=pytest.mark.campaign), pytest.param(True, id="made-anew")]
)
def test_a_lost_slot_begins_a_new_chain_and_everyone_resynchronises(new_cluster: NewCluster, remake: bool) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) AS g")
    cluster.wait()
    before = slave.sql("SELECT incarnation FROM pmgsync.position WHERE origin = 1")
    master.kill("agent")
    eventually(lambda: master.sql("SELECT count(*) FROM pg_stat_replication") == [(0,)])
    master.sql("SELECT pg_drop_replication_slot('pmgsync')")
    # Nobody will ever read these from the WAL.
    master.sql("UPDATE t SET v = 'lost' WHERE id <= 50")
    master.sql("DELETE FROM t WHERE id > 90")
    if remake:
        master.sql("SELECT pg_create_logical_replication_slot('pmgsync', 'pgoutput')")
        master.sql("INSERT INTO t VALUES (1000, 'after')")
    master.start("agent")
    eventually(
        lambda: slave.sql("SELECT incarnation FROM pmgsync.position WHERE origin = 1") != before,
        within_s=60,
        what="a new incarnation on the slave",
    )
    master.sql("INSERT INTO t VALUES (2000, 'on')")
    cluster.wait()
    cluster.assert_equal(["t"])
    assert "slot" in master.log("agent")
    wait_healthy(cluster)


@pytest.mark.campaign
def test_a_slave_restored_from_an_older_copy_catches_up(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    bank = Bank(master, 3)
    for _ in range(50):
        bank.step()
    cluster.wait()
    data = slave.server.data_dir
    copy = data.with_name("older")
    slave.stop()
    slave.server.stop()
    subprocess.run(["cp", "-a", str(data), str(copy)], check=True)
    slave.server.start()
    slave.start()
    for _ in range(50):
        bank.step()
    cluster.wait()
    slave.stop()
    slave.server.stop()
    shutil.rmtree(data)
    copy.rename(data)
    slave.server.start()
    slave.start()
    for _ in range(20):
        bank.step()
    cluster.wait()
    cluster.assert_equal(BANK_TABLES)
    wait_healthy(cluster)


@pytest.mark.campaign
def test_a_lost_journal_of_the_master_is_noticed(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) AS g")
    cluster.wait()
    slave.kill("broker")
    slave.kill("agent")
    master.sql("INSERT INTO t SELECT g, 'b' FROM generate_series(101, 200) AS g")
    master.pmgcm("wait", "--timeout", "3", check=False)
    eventually(lambda: confirmed_lsn(master) >= _head(master), what="the slot is confirmed")
    master.kill("broker")
    shutil.rmtree(master.directory / "state" / "journal")
    master.start()
    slave.start()
    cluster.wait()
    cluster.assert_equal(["t"])


def _head(node: Node) -> int:
    return parse_lsn(node.node_status(1)["head"])


@pytest.mark.campaign
def test_a_second_agent_on_one_database_does_not_disturb(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master = cluster.master
    twin = subprocess.Popen(
        [*master.processes["agent"].args],  # type: ignore[misc]
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for number in range(20):
            master.sql("INSERT INTO t VALUES (%s, 'x')", (number,))
            time.sleep(0.1)
    finally:
        twin.terminate()
        twin.wait(15)
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.campaign
def test_a_damaged_journal_costs_a_resync_and_no_silence(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    slave.stop()
    for number in range(30):
        master.sql("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(%s, %s) AS g",
                   (number * 100, number * 100 + 99))  # fmt: skip
    eventually(lambda: confirmed_lsn(master) >= _head(master), what="everything is in the journal")
    path = next((master.directory / "state" / "journal").glob("1-*.db"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as journal:
        (key,) = journal.execute("SELECT key FROM body ORDER BY key LIMIT 1 OFFSET 10").fetchone()
        (body,) = journal.execute("SELECT data FROM body WHERE key = ?", (key,)).fetchone()
        flipped = bytes([*body[:-9], body[-9] ^ 1, *body[-8:]])
        journal.execute("UPDATE body SET data = ? WHERE key = ?", (flipped, key))
    slave.start()
    cluster.wait(timeout_s=120)
    cluster.assert_equal(["t"])
    assert "action=resync" in slave.log("agent")
    assert "damaged" in alerts(master, 1)


@pytest.mark.campaign
def test_a_real_link_that_goes_down_and_up(new_cluster: NewCluster, new_network: NewNetwork) -> None:
    links = new_network(2)
    cluster = new_cluster(nodes=2, schema=STANDARD, namespaces=links.names)
    master, slave = cluster.nodes
    bank, witness = Bank(master, 5), Witness(slave)
    threads = [Stoppable(bank.step), Stoppable(witness.step)]
    try:
        for seconds in (1, 8):
            time.sleep(1)
            links.cut(1)
            time.sleep(seconds)
            if seconds > 5:
                assert master.node_status(2)["state"] == "ERROR"
            links.heal(1)
    finally:
        for thread in threads:
            thread.stop()
    cluster.wait(timeout_s=120)
    cluster.assert_equal(BANK_TABLES)


# -- large transactions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [int(os.environ.get("PMGSYNC_LARGE_ROWS", "300000"))])
def test_a_large_transaction_is_whole_or_nothing_and_memory_bounded(new_cluster: NewCluster, rows: int) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    peak: dict[str, int] = {}

    def watch() -> None:
        for node in cluster.nodes:
            processes = {f"{node.name} {name}": process for name, process in node.workers().items()}
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[f"{node.name} broker"] = psutil.Process(node.processes["broker"].pid)
            for name, process in processes.items():
                try:
                    peak[name] = max(peak.get(name, 0), process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
        seen = slave.sql("SELECT count(*) FROM t")[0][0]
        assert seen in {0, rows}, f"{seen} rows of a transaction that is not over"
        time.sleep(0.05)

    watching = Stoppable(watch)
    try:
        master.sql("INSERT INTO t SELECT g, 'row ' || g FROM generate_series(1, %s) AS g", (rows,))
        slave.kill("broker")
        slave.start()
        master.kill("broker")
        master.start()
        slave.workers()["apply:1"].kill()
        cluster.wait(timeout_s=600)
    finally:
        watching.stop()
    cluster.assert_equal(["t"], "count(*), sum(id), min(v), max(v)")
    print({name: f"{value >> 20} MB" for name, value in sorted(peak.items())})
    assert all(value < RSS_LIMIT for value in peak.values()), peak


@pytest.mark.campaign
def test_many_tables_in_one_transaction(new_cluster: NewCluster) -> None:
    count = int(os.environ.get("PMGSYNC_MANY_TABLES", "400"))
    tables = [f"m{number}" for number in range(count)]
    cluster = new_cluster(nodes=2, schema=";".join(f"CREATE TABLE {table} (id int PRIMARY KEY)" for table in tables))
    cluster.master.sql(";".join(f"INSERT INTO {table} SELECT generate_series(1, 20)" for table in tables))
    cluster.wait(timeout_s=300)
    rss = {
        f"{node.name} {name}": process.memory_info().rss
        for node in cluster.nodes
        for name, process in {**node.workers(), "broker": psutil.Process(node.processes["broker"].pid)}.items()
    }
    print(f"{count} tables:", {name: f"{value >> 20} MB" for name, value in sorted(rss.items())})
    assert all(value < RSS_LIMIT for value in rss.values()), rss
    union = "UNION ALL ".join(f"SELECT '{table}' AS name, count(*) FROM {table} " for table in tables)
    assert sorted(cluster.nodes[1].sql(union)) == sorted(cluster.master.sql(union))


# -- idle, blocked, stopped -------------------------------------------------------------------------------------------


def test_the_slot_advances_when_only_other_tables_are_written(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=1, schema=STANDARD)
    master = cluster.master
    before = confirmed_lsn(master)
    master.sql("CREATE UNLOGGED TABLE noise (id int)")
    master.sql("INSERT INTO noise SELECT generate_series(1, 1000)")
    master.sql("SELECT pg_logical_emit_message(false, 'other', repeat('x', 1000000))")
    eventually(lambda: confirmed_lsn(master) > before + 1_000_000, what="the slot advances")


@pytest.mark.campaign
def test_an_apply_that_is_blocked_for_long_harms_nobody(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    for node in cluster.nodes:
        node.server.set(wal_sender_timeout="5s")
    walsender = eventually(lambda: master.sql("SELECT pid FROM pg_stat_replication"))
    blocker = psycopg2.connect(slave.server.dsn(slave.dbname))
    try:
        with blocker.cursor() as cursor:
            cursor.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        master.sql("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 1000) AS g")
        time.sleep(11)
        assert master.sql("SELECT pid FROM pg_stat_replication") == walsender, "the server lost patience"
        eventually(lambda: master.node_status(2)["state"] == "S", what="the slave is shown as behind")
        assert master.node_status(2)["lag_s"] > 3
        eventually(lambda: confirmed_lsn(master) >= _head(master), what="the master's slot goes on")
        blocker.rollback()
    finally:
        blocker.close()
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.campaign
def test_postgresql_stops_at_once_on_either_side(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    cluster.master.sql("INSERT INTO t VALUES (1, 'x')")
    cluster.wait()
    for node in cluster.nodes:
        node.server.stop(timeout=20)
        eventually(lambda: "ERROR" in cluster.master.pmgcm("status", check=False).stdout, within_s=60)
        node.server.start()
    cluster.master.sql("INSERT INTO t VALUES (2, 'x')")
    cluster.wait()
    cluster.assert_equal(["t"])


def test_services_that_are_told_to_stop_end_soon_and_cost_no_resync(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    cluster.wait()
    incarnation = "SELECT incarnation FROM pmgsync.position WHERE origin = 1"
    before = slave.sql(incarnation)
    bank, witness = Bank(master, 13), Witness(slave)
    threads = [Stoppable(bank.step), Stoppable(witness.step)]
    took: dict[str, float] = {}
    try:
        for node in cluster.nodes:
            for service in ("broker", "agent"):
                time.sleep(1)
                process, workers = node.processes[service], list(node.workers().values())
                since = time.monotonic()
                process.terminate()
                assert process.wait(15) == 0, f"{service} of {node.name}"
                took[f"{node.name} {service}"] = round(time.monotonic() - since, 1)
                if service == "agent":
                    assert not any(worker.is_running() for worker in workers), "workers outlive their agent"
                node.start()
            time.sleep(1)
            # A server that is shut down in good order waits until the slot's reader has everything.
            node.server.stop(timeout=30)
            node.server.start()
    finally:
        for thread in threads:
            thread.stop()
    cluster.wait()
    cluster.assert_equal(BANK_TABLES)
    print(f"seconds to stop: {took}")
    assert slave.sql(incarnation) == before
    for node in reversed(cluster.nodes):  # whose chain was broken tells why
        log = node.log("agent")
        assert "chain-broken" not in log, f"{node.name}\n{log[-5000:]}\n--- broker\n{node.log('broker')[-3000:]}"
        assert "action=resync " not in log, node.name
    wait_healthy(cluster)
