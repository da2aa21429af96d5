"""The lease on real nodes: clients write throughout, and the master closes and opens again, whatever befalls it.

Configuration is written on the master alone and is refused while it is closed; mail is written everywhere, always.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg2
import psycopg2.errors
import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.health import NewCluster
from tests.harness.ledger import SCHEMA, Ledger, Outcome, balance, write_profile
from tests.harness.network import Network

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

LEASE_S = 3.0
CLOSES_S = LEASE_S + 1.0
"""A client's own statement takes a while, and so does noticing."""


class Fenced:
    """A fenced cluster whose clients write configuration and mail on every node."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.master, *self.others = cluster.nodes
        eventually(lambda: self.fence() == "lease", what="the fence comes in force")
        self.ledger = Ledger(cluster)
        self.ledger.__enter__()
        self.await_open(0.0)

    def fence(self) -> str:
        return str(self.master.status()["lease"]["fence"])

    def await_open(self, since: float) -> None:
        eventually(lambda: self.ledger.acknowledged_since(1, since), within_s=30, what="the master takes writes")

    def await_closed(self, since: float) -> float:
        """Wait until the master refuses; returns the seconds from `since` to the end of the last write that it took."""

        def refused() -> bool:
            last = max((write.ended for write in self.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1)), default=0)
            later = [w for w in self.ledger.of("configuration", Outcome.REFUSED, 1) if w.begun > max(last, since)]
            return len(later) > 20

        eventually(refused, within_s=30, what="the master refuses")
        last = max(write.ended for write in self.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1))
        said = self.ledger.of("configuration", Outcome.REFUSED, 1)[-1].said
        assert said.startswith("25006 "), said
        assert "a majority of the members does not answer it" in said
        return last - since

    def mails(self, node: Node) -> int:
        return len(self.ledger.of("mail", Outcome.ACKNOWLEDGED, self.cluster.nodes.index(node) + 1))

    def assert_mail_goes_on(self, *nodes: Node) -> None:
        """Mail is written while the master is closed."""
        for node in nodes:
            before = self.mails(node)
            eventually(lambda node=node, before=before: self.mails(node) > before + 20, within_s=10)  # type: ignore[misc]

    def settle(self) -> None:
        self.ledger.stop()
        self.cluster.wait()
        account = balance(self.cluster, self.ledger, set())
        print(f"LEASE {account}")
        assert not account.lost


@pytest.fixture
def fenced(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Fenced]:
    made = Fenced(new_cluster(nodes=3, **options(tmp_path)))
    yield made
    made.ledger.stop()


def options(directory: Path) -> dict[str, object]:
    return {
        "profile": write_profile(directory),
        "schema": SCHEMA,
        "extra": f"[cluster]\nlease_s = {LEASE_S:g}\n",
    }


def tree(node: Node) -> list[psutil.Process]:
    """Return the agent with its workers."""
    return [psutil.Process(node.processes["agent"].pid), *node.workers().values()]


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def test_under_load_nobody_is_refused(fenced: Fenced) -> None:
    end = time.monotonic() + 4 * LEASE_S
    pressure = fenced.master.server.dsn("app")
    rounds = 0
    with psycopg2.connect(pressure) as connection, connection.cursor() as cursor:
        while time.monotonic() < end:
            rounds += 1
            cursor.execute(
                "INSERT INTO mail SELECT 1, -%s - g, 'x' FROM generate_series(1, 5000) AS g", (rounds * 5000,)
            )
            connection.commit()
    refused = fenced.ledger.of("configuration", Outcome.REFUSED, 1)
    assert not refused, refused[0]
    fenced.ledger.stop()
    fenced.cluster.wait()


def test_an_agent_that_is_frozen_closes_and_opens_again(fenced: Fenced) -> None:
    frozen = tree(fenced.master)
    since = time.time()
    signal_all(frozen, signal.SIGSTOP)
    try:
        took = fenced.await_closed(since)
        assert took < CLOSES_S
        fenced.assert_mail_goes_on(*fenced.cluster.nodes)
    finally:
        signal_all(frozen, signal.SIGCONT)
    fenced.await_open(time.time())
    print(f"LEASE agent frozen: wrote for {took:.2f} s more")
    fenced.settle()


def test_an_agent_that_is_killed_closes_and_opens_again(fenced: Fenced) -> None:
    doomed = tree(fenced.master)
    since = time.time()
    signal_all(doomed, signal.SIGKILL)
    fenced.master.processes["agent"].wait(15)
    took = fenced.await_closed(since)
    assert took < CLOSES_S
    fenced.assert_mail_goes_on(*fenced.cluster.nodes)
    started = time.time()
    fenced.master.start("agent")
    fenced.await_open(started)
    print(f"LEASE agent killed: wrote for {took:.2f} s more")
    fenced.settle()


def test_a_broker_that_is_frozen_closes_and_opens_again(fenced: Fenced) -> None:
    since = time.time()
    fenced.master.kill("broker", signal.SIGSTOP)
    took = fenced.await_closed(since)
    assert took < CLOSES_S
    fenced.assert_mail_goes_on(*fenced.cluster.nodes)
    fenced.master.kill("broker", signal.SIGCONT)
    fenced.await_open(time.time())
    print(f"LEASE broker frozen: wrote for {took:.2f} s more")
    fenced.settle()


@pytest.mark.parametrize("which", ["broker", "agent", "server", "all"])
def test_after_a_restart_it_opens_by_itself(fenced: Fenced, which: str) -> None:
    master = fenced.master
    if which in {"agent", "all"}:
        signal_all(tree(master), signal.SIGKILL)
        master.processes["agent"].wait(15)
    if which in {"broker", "all"}:
        master.kill("broker")
    if which in {"server", "all"}:
        master.server.kill()
        master.server.start()
        if which == "all":
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                master.sql("INSERT INTO configuration (key) VALUES ('nobody has acknowledged it yet')")
    started = time.time()
    master.start()
    fenced.await_open(started)
    print(f"LEASE restart of {which}: open after {opened_after(fenced, started):.2f} s")
    fenced.settle()


def opened_after(fenced: Fenced, since: float) -> float:
    return min(w.ended for w in fenced.ledger.of("configuration", Outcome.ACKNOWLEDGED, 1) if w.begun > since) - since


def test_one_member_less_changes_nothing_two_less_close(fenced: Fenced) -> None:
    one, two = fenced.others
    since = time.time()
    one.kill("broker")
    time.sleep(2 * LEASE_S)  # the time itself is what is tested: nobody is refused in it
    assert not [w for w in fenced.ledger.of("configuration", Outcome.REFUSED, 1) if w.begun > since]
    since = time.time()
    two.kill("broker")
    assert fenced.await_closed(since) < CLOSES_S
    status = fenced.master.pmgcm("status", check=False)
    assert status.returncode == 1
    assert (
        "none, the tables are closed, acknowledged by 1 of 3, 2 are needed; missing node2(2), node3(3)" in status.stdout
    )
    started = time.time()
    two.start()
    fenced.await_open(started)
    one.start()
    fenced.settle()


def test_whoever_writes_is_refused(fenced: Fenced) -> None:
    """A superuser (all clients here are), a REPEATABLE READ transaction that is open, COPY and TRUNCATE."""
    master = fenced.master
    connection = psycopg2.connect(master.server.dsn(master.dbname))
    connection.set_session(isolation_level="REPEATABLE READ")
    cursor = connection.cursor()
    cursor.execute("INSERT INTO configuration (key) VALUES ('open')")
    for other in fenced.others:
        other.kill("broker", signal.SIGSTOP)
    fenced.await_closed(time.time())
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="cannot be committed any more"):
        connection.commit()
    connection.rollback()
    for statement in ("UPDATE configuration SET told = 'x'", "DELETE FROM configuration", "TRUNCATE configuration"):
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            master.sql(statement)
    assert master.sql("SELECT usesuper FROM pg_user WHERE usename = current_user") == [(True,)]
    for other in fenced.others:
        other.kill("broker", signal.SIGCONT)
    fenced.await_open(time.time())
    connection.close()
    fenced.settle()


def test_a_master_that_is_cut_off_closes_while_its_clients_go_on(
    new_cluster: NewCluster, new_network: Callable[[int], Network], tmp_path: Path
) -> None:
    network = new_network(3)
    fenced = Fenced(new_cluster(nodes=3, namespaces=network.names, **options(tmp_path)))
    try:
        since = time.time()
        network.cut(1)
        took = fenced.await_closed(since)
        assert took < CLOSES_S
        fenced.assert_mail_goes_on(*fenced.cluster.nodes)
        network.heal(1)
        fenced.await_open(time.time())
        print(f"LEASE cut off: wrote for {took:.2f} s more")
        fenced.settle()
    finally:
        fenced.ledger.stop()


def test_the_fence_comes_and_goes_with_the_third_voter(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=2, **options(tmp_path))
    master, slave = cluster.nodes
    assert master.status()["lease"]["fence"] == "none"
    slave.kill("broker", signal.SIGSTOP)
    time.sleep(LEASE_S + 1)  # the time itself is what is tested
    master.sql("INSERT INTO configuration (key) VALUES ('two members, one of them away')")
    slave.kill("broker", signal.SIGCONT)
    cluster.join(cluster.add_node("node3"))
    fenced = Fenced(cluster)
    refused = fenced.ledger.of("configuration", Outcome.REFUSED, 1)
    assert not refused, refused[0]
    master.pmgcm("delete", "3", "--yes")
    third = cluster.nodes.pop()
    third.stop()
    eventually(lambda: fenced.fence() == "none")
    slave.kill("broker", signal.SIGSTOP)
    since = time.time()
    time.sleep(LEASE_S + 1)  # likewise
    assert not [w for w in fenced.ledger.of("configuration", Outcome.REFUSED, 1) if w.begun > since]
    slave.kill("broker", signal.SIGCONT)
    fenced.ledger.stop()
    third.close()
