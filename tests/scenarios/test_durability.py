"""What status says was applied no crash takes back, also when commits do not wait for the disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable

pytestmark = pytest.mark.cluster
COMMIT_SOONER = 'synchronous_commit = "off"'
ROUNDS, MOST_ROUNDS = 2, 20
"""A kill just after the worker had everything flushed takes nothing back: then there is one more."""
COMMITS = 150
"""Of the master in each round, before the slave's server is killed."""


def told(node: Node, of: Node, key: str = "positions") -> int:
    """Return up to which LSN of node 1's chain a node is told to have applied, by `of`'s broker."""
    cid = int(node.name.removeprefix("node"))
    return parse_lsn(next(each for each in of.status()["nodes"] if each["cid"] == cid)[key].get("1", "0/0"))


def commit_more(bank: Bank) -> None:
    """Wait until a node has committed many transactions more."""
    goal = bank.committed + COMMITS
    eventually(lambda: bank.committed >= goal, what="transactions are committed")


def await_applied(node: Node, beyond: int) -> None:
    """Wait until a node has applied more than it had."""
    eventually(lambda: told(node, node) > beyond, what="applying goes on")


def test_a_killed_server_takes_back_nothing_that_was_told_to_be_applied(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD, extra=COMMIT_SOONER)
    master, slave = cluster.nodes
    cluster.wait()
    # So that nobody but the apply worker has what it commits flushed, and much is lost when the server is killed.
    slave.server.set(wal_writer_delay="10000ms")
    bank = Bank(master, 5)
    writing = Stoppable(bank.step)
    taken_back = rounds = 0
    try:
        while rounds < ROUNDS or (not taken_back and rounds < MOST_ROUNDS):
            rounds += 1
            commit_more(bank)
            slave.workers()["apply:1"].suspend()
            ((read,),) = slave.sql("SELECT max(id) FROM marker")
            slave.server.kill()
            # The broker says what it last heard; nothing that it says may be gone.
            durable = max(told(slave, slave), told(slave, master))
            slave.kill("agent")
            slave.server.start()
            ((position,),) = slave.sql("SELECT lsn::text FROM pmgsync.position WHERE origin = 1")
            assert parse_lsn(position) >= durable
            ((newest,),) = slave.sql("SELECT max(id) FROM marker")
            taken_back += newest < read
            slave.start("agent")
            await_applied(slave, durable)
    finally:
        writing.stop()
    assert taken_back, "the server never lost anything: this test has shown nothing"
    cluster.wait()
    cluster.assert_equal(BANK_TABLES)
    assert told(slave, slave) == told(slave, slave, "visible") == told(master, master)
    assert not any("resync" in line for line in slave.log("agent").splitlines())
