"""Synchronous mode on real processes: what is acknowledged is on the slaves, whoever is killed; and nobody hangs who
should not.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.failover import LEASE_S, SEEDS, Failover
from tests.harness.health import alerts
from tests.harness.ledger import SCHEMA, Outcome, write_profile
from tests.harness.promotions import begun
from tests.harness.schema import STANDARD

pytestmark = pytest.mark.cluster

NewCluster = Callable[..., Cluster]
OURS = 'FIRST 1 ("pmgsync capture")'
WRITERS = 4
_ids = itertools.count(100_000)


def mode(node: Node) -> dict[str, Any]:
    """Return what a node says of synchronous mode."""
    found: dict[str, Any] = node.status()["synchronous"]
    return found


def await_state(node: Node, state: str) -> None:
    eventually(lambda: mode(node)["state"] == state, what=f"{node.name} is {state}")


def names(node: Node) -> str:
    return str(node.sql("SHOW synchronous_standby_names")[0][0])


def hangs(node: Node) -> bool:
    """True while a commit waits for slaves."""
    return bool(node.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))


def ids(node: Node) -> set[int]:
    return {row[0] for row in node.sql("SELECT id FROM t")}


def kill_machine(node: Node) -> None:
    """End a node's services and its server at once, as a loss of power would."""
    for worker in node.workers().values():
        worker.kill()
    node.kill("agent")
    node.kill("broker")
    node.server.kill()


class Commit:
    """One insert in a session of its own, in a thread: whether its client was told that it is done."""

    def __init__(self, node: Node) -> None:
        self.id = next(_ids)
        self.acknowledged = False
        self.error: psycopg2.Error | None = None
        self._dsn = node.server.dsn(node.dbname)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.closing(psycopg2.connect(self._dsn)) as connection:
                with connection, connection.cursor() as cursor:
                    cursor.execute("INSERT INTO t VALUES (%s, 'x')", (self.id,))
                self.acknowledged = True
        except psycopg2.Error as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, within_s: float = 60.0) -> bool:
        """Wait for its end; True when it was acknowledged."""
        self._thread.join(within_s)
        assert self.over, "the commit still hangs"
        return self.acknowledged


@contextlib.contextmanager
def writing(node: Node) -> Iterator[list[int]]:
    """Yield the list of what was acknowledged to clients that go on until the server is gone, or the block ends."""
    done: list[int] = []
    stop = threading.Event()

    def write() -> None:
        with (
            contextlib.suppress(psycopg2.Error),
            contextlib.closing(psycopg2.connect(node.server.dsn(node.dbname))) as connection,
        ):
            connection.autocommit = True
            with connection.cursor() as cursor:
                while not stop.is_set():
                    number = next(_ids)
                    cursor.execute("INSERT INTO t VALUES (%s, repeat('x', %s))", (number, number % 2000))
                    done.append(number)

    threads = [threading.Thread(target=write, daemon=True) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


@pytest.mark.campaign
def test_a_killed_master_has_acknowledged_nothing_that_no_slave_has(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    master, second, third = cluster.nodes
    told = master.pmgcm("synchronous", "1", "--wait").stdout
    assert "wait for 1 slave" in told
    await_state(master, "synchronous")
    assert names(master) == OURS
    assert "commits on the master wait for 1 slave, durable, without end" in master.pmgcm("status").stdout
    with writing(master) as acknowledged:
        eventually(lambda: len(acknowledged) > 100, what="clients are served")
        # Only the other one can acknowledge from now on, and what it says must be true.
        second.workers()["apply:1"].suspend()
        goal = len(acknowledged) + 100
        eventually(lambda: len(acknowledged) > goal, what="one slave is enough")
        kill_machine(master)
    third.server.kill()
    third.server.start()
    missing = set(acknowledged) - ids(second) - ids(third)
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged writes are on no slave"
    print(f"{len(acknowledged)} acknowledged, {len(ids(third) - set(acknowledged))} more on the slave")


@pytest.mark.campaign
def test_commits_wait_or_go_on_when_slaves_are_gone_and_it_comes_back(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.pmgcm("synchronous", "1", "--degrade", "2")
    await_state(master, "synchronous")
    assert slave.pmgcm("synchronous", "1", check=False).returncode == 1, "only the master sets it"
    assert "2 cannot be waited for" in master.pmgcm("synchronous", "2", check=False).stderr

    # After its patience it goes on without, and says so.
    slave.kill("agent")
    commit = Commit(master)
    eventually(lambda: hangs(master), what="a commit waits")
    assert commit.result(), "it did not go on without slaves"
    await_state(master, "degraded")
    eventually(lambda: names(master) == "", what="the server waits for nobody")
    assert "DEGRADED" in master.pmgcm("status", check=False).stdout
    assert "action=synchronous-degraded" in master.log("broker")
    assert Commit(master).result(5)
    slave.start("agent")
    await_state(master, "synchronous")
    assert "action=synchronous-restored" in master.log("broker")
    assert names(master) == OURS

    # An agent that is stopped by request lets go; a broker that is silent is not waited for either.
    master.kill("agent", signal.SIGTERM)
    assert names(master) == ""
    assert Commit(master).result(5)
    master.start("agent")
    await_state(master, "synchronous")
    master.kill("broker")
    assert Commit(master).result(), "it did not go on without the broker"
    assert names(master) == ""
    master.start("broker")
    await_state(master, "synchronous")

    # Without patience they wait, whatever is restarted.
    master.pmgcm("synchronous", "1", "--wait")
    slave.kill("broker")
    commit = Commit(master)
    await_state(master, "waiting")
    assert "commits have been waiting for slaves" in master.pmgcm("status", check=False).stdout
    for service in ("broker", "agent"):
        master.kill(service)
        master.start(service)
    eventually(lambda: mode(master)["waiting_s"] > 4, what="it waits again, longer than it did before")
    assert not commit.over and hangs(master)
    assert names(master) == OURS
    slave.start("broker")
    assert commit.result()
    assert commit.id in ids(slave)
    master.pmgcm("synchronous", "off")
    eventually(lambda: names(master) == "", what="the server waits for nobody")
    cluster.wait()
    cluster.assert_equal(["t"])


@pytest.mark.campaign
def test_a_replaced_master_tells_nobody_that_a_lost_commit_is_done(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.pmgcm("synchronous", "1", "--wait")
    await_state(master, "synchronous")
    kept = Commit(master)
    assert kept.result()
    for worker in master.workers().values():
        worker.kill()
    master.kill("agent")
    master.kill("broker")
    lost = Commit(master)
    eventually(lambda: hangs(master), what="the commit waits")
    slave.pmgcm("promote", "--force", "--yes")
    assert not mode(slave)["in_force"], "a forced epoch begins without"
    master.start()
    assert not lost.result(), "a commit that does not count was acknowledged"
    eventually(lambda: names(master) == "", what="the old master's server waits for nobody")
    await_state(slave, "synchronous")
    assert names(slave) == OURS
    cluster.wait(node=slave)
    eventually(lambda: ids(master) == ids(slave), what="both are the same")
    assert kept.id in ids(slave)
    assert lost.id not in ids(slave)
    assert Commit(slave).result()


@pytest.mark.campaign
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nodes", [3, 5])
def test_nothing_acknowledged_is_lost_or_exported_when_the_master_is_killed_and_another_promoted(
    new_cluster: NewCluster, tmp_path: Path, nodes: int, seed: int
) -> None:
    cluster = new_cluster(
        nodes=nodes,
        schema=SCHEMA,
        profile=write_profile(tmp_path),
        extra=f'[cluster]\nfence = "lease"\nlease_s = {LEASE_S}',
    )
    cluster.wait()
    scene = Failover(cluster, seed)
    scene.nodes[0].pmgcm("synchronous", str(nodes // 2), "--wait")
    await_state(scene.nodes[0], "synchronous")
    try:
        scene.load()
        old, heir = scene.nodes[0], scene.random.choice(scene.nodes[1:])
        scene.kill_machine(old)
        mail = {write.key for write in scene.ledger.of("mail", Outcome.ACKNOWLEDGED, 1)}
        scene.promote(heir)
        scene.await_open(heir)
        there = {row.strip("()") for row in heir.content("mail", "key")}
        assert mail <= there, "mail that the old master acknowledged is not on the new one"
        await_state(heir, "synchronous")
        scene.start_machine(old)
        account = scene.settle()
    finally:
        scene.ledger.stop()
    assert account.lost == () and account.exported == 0


@pytest.mark.campaign
@pytest.mark.parametrize("seed", SEEDS)
def test_a_switchover_in_synchronous_mode(new_cluster: NewCluster, tmp_path: Path, seed: int) -> None:
    cluster = new_cluster(
        nodes=3,
        schema=SCHEMA,
        profile=write_profile(tmp_path),
        extra=f'[cluster]\nfence = "lease"\nlease_s = {LEASE_S}',
    )
    cluster.wait()
    scene = Failover(cluster, seed)
    scene.nodes[0].pmgcm("synchronous", "2", "--wait")
    await_state(scene.nodes[0], "synchronous")
    try:
        scene.load()
        for node in (scene.nodes[1], scene.nodes[0]):
            scene.promote(node)
            scene.await_open(node)
            await_state(node, "synchronous")
        account = scene.settle()
    finally:
        scene.ledger.stop()
    assert account.lost == () and account.exported == 0
    assert [names(node) for node in scene.nodes] == [OURS, "", ""]


@pytest.mark.campaign
@pytest.mark.parametrize("patience", [["--wait"], ["--degrade", "6"]])
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_new_master_opens_when_commits_wait_and_not_when_sessions_show_the_setting(
    new_cluster: NewCluster, nodes: int, patience: list[str]
) -> None:
    """Its checkpointer is held up, as by a checkpoint: until it goes on, no commit waits whatever the setting says."""
    cluster = new_cluster(nodes=nodes, schema=STANDARD)
    master, heir, *others = cluster.nodes
    master.pmgcm("synchronous", str(nodes - 1), *patience)
    await_state(master, "synchronous")
    ((pid,),) = heir.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
    checkpointer = psutil.Process(pid)
    checkpointer.suspend()
    try:
        with begun(heir):
            eventually(lambda: names(heir) == OURS, what="sessions on the new master show the setting")
            until = time.monotonic() + (10 if patience == ["--wait"] else 3)
            while time.monotonic() < until:
                commit = Commit(heir)
                assert not commit.result(), "a commit returned that no slave need have"
                assert isinstance(commit.error, psycopg2.errors.ReadOnlySqlTransaction), commit.error
            assert mode(heir)["state"] == "starting"
            if patience != ["--wait"]:
                eventually(lambda: Commit(heir).result(), what="it opens without, after its patience")
            assert "checkpointer has not followed" in alerts(heir, 2)
    finally:
        checkpointer.resume()
    await_state(heir, "synchronous")
    eventually(lambda: not alerts(heir, 2), what="it is well")
    appliers = [slave.workers()["apply:2"] for slave in (master, *others)]
    for applier in appliers:
        applier.suspend()
    commit = Commit(heir)
    eventually(lambda: hangs(heir), what="a commit waits")
    assert not commit.over
    for applier in appliers:
        applier.resume()
    assert commit.result()
