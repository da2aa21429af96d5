"""Errors that stop a chain, limits that are reached, a full disk, and everything at once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, eventually
from tests.harness.health import NewCluster, alerts, confirmed_lsn, wait_healthy
from tests.harness.schema import BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable, Witness

pytestmark = pytest.mark.cluster


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
    assert confirmed_lsn(master) < parse_lsn(master.sql("SELECT pg_current_wal_lsn()::text")[0][0])
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


@pytest.mark.campaign
def test_a_short_nemesis(new_cluster: NewCluster) -> None:
    run_nemesis(new_cluster(nodes=3, schema=STANDARD), chosen_seed(), 8)


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_a_long_nemesis(new_cluster: NewCluster) -> None:
    rounds = int(os.environ.get("PMGSYNC_ROUNDS") or "200")
    run_nemesis(new_cluster(nodes=3, schema=STANDARD), chosen_seed(), rounds)
