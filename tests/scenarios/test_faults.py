"""What may go wrong with databases, slots, disks and processes: each ends equal, or in the loud state it should."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable, Witness

pytestmark = pytest.mark.cluster
NewCluster = Callable[..., Cluster]
RSS_LIMIT = 256 << 20


def alerts(node: Node, cid: int) -> str:
    """Return the alerts and the error of a member as one text."""
    found = node.node_status(cid)
    return " | ".join([found["error"] or "", *(alert["text"] for alert in found["alerts"])])


def wait_healthy(cluster: Cluster) -> None:
    """Wait until every node is active on the master's status."""
    eventually(
        lambda: all(node["state"] == "A" for node in cluster.master.status()["nodes"]),
        within_s=60,
        what="all nodes active",
    )


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


def test_a_lost_journal_of_the_master_is_noticed(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) AS g")
    cluster.wait()
    slave.kill("broker")
    slave.kill("agent")
    master.sql("INSERT INTO t SELECT g, 'b' FROM generate_series(101, 200) AS g")
    master.pmgcm("wait", "--timeout", "3", check=False)
    eventually(lambda: _confirmed(master) >= _head(master), what="the slot is confirmed")
    master.kill("broker")
    shutil.rmtree(master.directory / "state" / "journal")
    master.start()
    slave.start()
    cluster.wait()
    cluster.assert_equal(["t"])


def _confirmed(node: Node) -> int:
    return parse_lsn(node.sql("SELECT confirmed_flush_lsn::text FROM pg_replication_slots")[0][0])


def _head(node: Node) -> int:
    return parse_lsn(node.node_status(1)["head"])


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


def test_a_damaged_journal_costs_a_resync_and_no_silence(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    slave.stop()
    for number in range(30):
        master.sql("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(%s, %s) AS g",
                   (number * 100, number * 100 + 99))  # fmt: skip
    eventually(lambda: _confirmed(master) >= _head(master), what="everything is in the journal")
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
def test_a_real_link_that_goes_down_and_up(new_cluster: NewCluster, namespaces: tuple[str, str]) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD, namespaces=namespaces)
    master, slave = cluster.nodes
    bank, witness = Bank(master, 5), Witness(slave)
    threads = [Stoppable(bank.step), Stoppable(witness.step)]
    try:
        for seconds in (1, 8):
            time.sleep(1)
            subprocess.run(["ip", "-n", namespaces[0], "link", "set", "veth0", "down"], check=True)
            time.sleep(seconds)
            if seconds > 5:
                assert master.node_status(2)["state"] == "ERROR"
            subprocess.run(["ip", "-n", namespaces[0], "link", "set", "veth0", "up"], check=True)
    finally:
        for thread in threads:
            thread.stop()
    cluster.wait(timeout_s=120)
    cluster.assert_equal(BANK_TABLES)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them, 10.213.7.1 and 10.213.7.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and iproute2")
    names = f"pmgsync{os.getpid()}a", f"pmgsync{os.getpid()}b"
    made = []
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        link = ["ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns"]
        if subprocess.run([*link, names[1]], check=False, capture_output=True).returncode:
            pytest.skip("links between network namespaces cannot be made here")
        for number, name in enumerate(names, 1):
            subprocess.run(["ip", "-n", name, "addr", "add", f"10.213.7.{number}/30", "dev", "veth0"], check=True)
            for device in ("lo", "veth0"):
                subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


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
    before = _confirmed(master)
    master.sql("CREATE UNLOGGED TABLE noise (id int)")
    master.sql("INSERT INTO noise SELECT generate_series(1, 1000)")
    master.sql("SELECT pg_logical_emit_message(false, 'other', repeat('x', 1000000))")
    eventually(lambda: _confirmed(master) > before + 1_000_000, what="the slot advances")


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
        eventually(lambda: _confirmed(master) >= _head(master), what="the master's slot goes on")
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


# -- apply errors -----------------------------------------------------------------------------------------------------


def test_an_error_that_does_not_pass_is_loud_and_heals_with_its_cause(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    slave.sql("SET session_replication_role = replica; INSERT INTO t VALUES (7, 'stands against it')")
    position = "SELECT lsn FROM pmgsync.position WHERE origin = 1"
    master.sql("INSERT INTO t VALUES (7, 'from the master')")
    text = eventually(
        lambda: alerts(master, 2) if "23505" in alerts(master, 2) or "t_pkey" in alerts(master, 2) else ""
    )
    assert "public.t" in text
    stood = slave.sql(position)
    master.sql("INSERT INTO marker VALUES (1, 'x')")
    time.sleep(1)
    assert slave.sql(position) == stood, "the position moved past an error"
    assert slave.sql("SELECT count(*) FROM marker") == [(0,)]
    slave.sql("SET session_replication_role = replica; DELETE FROM t WHERE id = 7")
    cluster.wait()
    cluster.assert_equal(["t", "marker"])
    wait_healthy(cluster)


# -- retention --------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_a_slave_that_was_away_for_too_long_resynchronises_by_itself(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD, extra='[journal]\nmax_size = "1MiB"')
    master, away, near = cluster.nodes
    assert near.name == "node3"
    master.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) AS g")
    cluster.wait()
    away.stop()
    for number in range(1, 16):
        master.sql(
            "INSERT INTO t SELECT g, repeat(md5(g::text), 30) FROM generate_series(%s, %s) AS g",
            (number * 1000, number * 1000 + 999),
        )
        time.sleep(0.2)
    master.sql("DELETE FROM t WHERE id < 50")
    eventually(lambda: "needs resync" in alerts(master, 1), within_s=90, what="the master says who is left behind")
    size = sum(path.stat().st_size for path in (master.directory / "state" / "journal").iterdir())
    retained = master.sql("SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots")
    assert retained[0][0] < 64 << 20, "a slave that is away keeps WAL on the master"
    away.start()
    cluster.wait(timeout_s=120)
    cluster.assert_equal(["t"])
    assert "action=resync" in away.log("agent")
    print(f"journal {size >> 20} MiB, WAL kept {retained[0][0]} bytes")


# -- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)], check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_journal_disk_stops_confirming_and_heals(new_cluster: NewCluster, small_disk: Path) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master = cluster.master
    master.stop()
    state = master.directory / "state"
    shutil.copytree(state, small_disk / "state", dirs_exist_ok=True)
    shutil.rmtree(state)
    state.symlink_to(small_disk / "state")
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (8 << 20))
    master.start()
    for number in range(12):
        master.sql(
            "INSERT INTO t SELECT g, repeat(md5(random()::text), 30) FROM generate_series(%s, %s) AS g",
            (number * 1000, number * 1000 + 999),
        )
    eventually(lambda: "disk is full" in alerts(cluster.nodes[1], 1), within_s=90, what="the full disk is in status")
    assert _confirmed(master) < parse_lsn(master.sql("SELECT pg_current_wal_lsn()::text")[0][0])
    ballast.unlink()
    # The journal still has to fit: nothing is lost when it does not, it only waits for retention.
    cluster.wait(timeout_s=120)
    cluster.assert_equal(["t"])


# -- everything at once -----------------------------------------------------------------------------------------------


def nemesis(cluster: Cluster, seed: int, rounds: int) -> list[str]:
    """Do random harm; the seed decides what is done and when, whatever state the cluster is in."""
    pick = random.Random(seed)
    done = []
    for _ in range(rounds):
        node = pick.choice(cluster.nodes)
        harm = pick.choice(["broker", "agent", "worker", "postgres", "stop-broker", "stop-worker", "pause"])
        # As many numbers in each round: what is there to be harmed must not change what follows.
        which, lasting, rest_s = pick.random(), pick.random(), pick.uniform(0.2, 1.5)
        done.append(f"{node.name}:{harm}")
        match harm:
            case "broker" | "agent":
                node.kill(harm)
                time.sleep(1.5 * lasting)
                node.start()
            case "postgres":
                node.server.kill()
                time.sleep(lasting)
                node.server.start()
            case "stop-broker":
                node.kill("broker", signal.SIGSTOP)
                time.sleep(1 + 6 * lasting)
                node.kill("broker", signal.SIGCONT)
            case "worker" | "stop-worker":
                workers = sorted(node.workers().items())
                if workers:
                    _, worker = workers[int(which * len(workers))]
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                        if harm == "worker":
                            worker.kill()
                        else:
                            worker.suspend()
                            time.sleep(1 + 4 * lasting)
                            worker.resume()
        time.sleep(rest_s)
    return done


def run_nemesis(cluster: Cluster, seed: int, rounds: int) -> None:
    """Run the bank, its witnesses and the nemesis; all ends equal."""
    bank = Bank(cluster.master, seed)
    witnesses = [Witness(node) for node in cluster.nodes[1:]]
    threads = [Stoppable(bank.step), *(Stoppable(witness.step) for witness in witnesses)]
    print(f"seed {seed}")
    try:
        done = nemesis(cluster, seed, rounds)
    finally:
        for thread in threads:
            thread.stop()
    cluster.wait(timeout_s=180)
    cluster.assert_equal(BANK_TABLES)
    looks = [witness.looks for witness in witnesses]
    print(f"seed {seed}: {bank.committed} transfers, {looks} looks, {' '.join(done)}")
    for node in cluster.nodes:
        # Nothing that was done takes anything away for good: a chain that is begun anew is one too many.
        assert "chain-broken" not in node.log("agent"), node.log("agent")[-5000:]
    wait_healthy(cluster)


def chosen_seed() -> int:
    """Return the seed that is asked for, or a new one."""
    return int(os.environ.get("PMGSYNC_SEED") or random.SystemRandom().randrange(1 << 30))


def test_a_short_nemesis(new_cluster: NewCluster) -> None:
    run_nemesis(new_cluster(nodes=3, schema=STANDARD), chosen_seed(), 8)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_long_nemesis(new_cluster: NewCluster) -> None:
    rounds = int(os.environ.get("PMGSYNC_ROUNDS") or "200")
    run_nemesis(new_cluster(nodes=3, schema=STANDARD), chosen_seed(), rounds)
