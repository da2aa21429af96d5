"""Two where there should be one: a second reader of a slot, a second node with the state of another."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import LogicalReplicationConnection

from pmgsync.agent import capture
from pmgsync.agent.capture import CaptureWorker
from pmgsync.config import load_config
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.wal.slot_reader import SlotReader
from pmgsync.wire.link import BrokerLink
from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import BANK_TABLES, STANDARD
from tests.harness.workload import Bank, Stoppable, Witness

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]
NewCluster = Callable[..., Cluster]
INCARNATION = "SELECT incarnation FROM pmgsync.position WHERE origin = 1"


def _kill_agent(node: Node) -> None:
    """Kill the agent, and wait until the server has noticed."""
    node.kill("agent")
    eventually(lambda: node.sql("SELECT count(*) FROM pg_stat_replication") == [(0,)], what="the slot is free")


def take(node: Node) -> int:
    """Read and confirm what the slot has, as somebody else; returns how many messages."""
    return int(
        node.sql(
            "SELECT count(*) FROM pg_logical_slot_get_binary_changes('pmgsync', NULL, NULL, "
            "'proto_version', '1', 'publication_names', 'pmgsync')"
        )[0][0]
    )


def test_who_else_reads_the_slot_is_named_and_what_he_took_is_fetched(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    options = {"proto_version": "1", "publication_names": '"pmgsync"'}
    master.sql("INSERT INTO t SELECT g, 'a' FROM generate_series(1, 100) AS g")
    cluster.wait()
    before = slave.sql(INCARNATION)
    _kill_agent(master)
    other = psycopg2.connect(master.server.dsn(master.dbname), connection_factory=LogicalReplicationConnection)
    with contextlib.closing(other):
        other.cursor().start_replication(slot_name="pmgsync", options=options, decode=False)
        master.start("agent")
        master.sql("UPDATE t SET v = 'held' WHERE id <= 10")
        eventually(lambda: "in use" in (master.node_status(1)["error"] or ""), what="the second reader is in status")
    cluster.wait()
    cluster.assert_equal(["t"])
    assert slave.sql(INCARNATION) == before, "who reads and confirms nothing costs nothing"
    _kill_agent(master)
    master.sql("UPDATE t SET v = 'taken' WHERE id > 90")
    master.sql("DELETE FROM t WHERE id = 50")
    assert take(master) > 10
    master.start("agent")
    eventually(lambda: slave.sql(INCARNATION) != before, what="a new incarnation on the slave")
    master.sql("INSERT INTO t VALUES (1000, 'on')")
    cluster.wait()
    cluster.assert_equal(["t"])


def test_what_is_taken_just_before_the_slot_is_ours_is_noticed(
    new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the slot and START_REPLICATION another reader may come and go."""
    cluster = new_cluster(nodes=1, schema=STANDARD)
    master = cluster.master
    _kill_agent(master)
    worker = CaptureWorker(load_config(master.config))
    renewed: list[object] = []
    failures: list[PmgsyncError] = []
    monkeypatch.setattr(worker.upkeep, "start", lambda: None)
    monkeypatch.setattr(worker, "_renew", renewed.append)
    monkeypatch.setattr(worker, "fail", failures.append)

    class Late(SlotReader):
        """Comes just after another reader."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            master.sql("INSERT INTO t VALUES (1)")
            assert take(master) > 0
            super().__init__(*arguments, **options)

    monkeypatch.setattr(capture, "SlotReader", Late)
    with contextlib.closing(BrokerLink(master.run_dir / "broker.sock", "capture")) as link:
        link.hello(5.0)
        worker.session(link)
    assert renewed
    assert "begins at" in str(failures)
    assert master.sql("SELECT active FROM pg_replication_slots") == [(False,)]


@contextlib.contextmanager
def twin_of(node: Node, name: str) -> Iterator[Node]:
    """A node with a copy of another's state, on the same database, with ports and a run directory of its own."""
    twin = Node(
        node.directory.with_name("twin"),
        name,
        profile=node.profile,
        dbname=node.dbname,
        address=node.address,
        extra=node.extra,
    )
    own, twin.server = twin.server, node.server
    try:
        node.stop()
        twin.directory.mkdir()
        shutil.copytree(node.directory / "state", twin.directory / "state")
        twin.write_config()
        node.start()
        yield twin
    finally:
        twin.server = own
        twin.close()


def test_a_copied_state_directory_is_refused_under_another_name(new_cluster: NewCluster) -> None:
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    with twin_of(slave, "twin") as twin:
        bank, witness = Bank(master, 7), Witness(slave)
        threads = [Stoppable(bank.step), Stoppable(witness.step)]
        try:
            twin.start()
            eventually(lambda: "must not be started as a second node" in twin.log("broker"))
            time.sleep(3)
        finally:
            for thread in threads:
                thread.stop()
        cluster.wait()
        cluster.assert_equal(BANK_TABLES)
        assert {node["cid"]: node["state"] for node in master.status()["nodes"]} == {1: "A", 2: "A"}


def test_two_nodes_with_one_cid_on_one_database_lose_and_double_nothing(new_cluster: NewCluster) -> None:
    """Name and address are right, so nothing refuses it: the database keeps the two apart, and status names it."""
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    with twin_of(slave, slave.name) as twin:
        bank, witness = Bank(master, 11), Witness(slave)
        threads = [Stoppable(bank.step), Stoppable(witness.step)]
        try:
            twin.start()
            eventually(lambda: "apply:1" in twin.workers(), what="the second apply worker runs")
            time.sleep(5)
            # While one is away the other goes on alone.
            for service in ("broker", "agent"):
                twin.kill(service)
            time.sleep(3)
            twin.start()
            for service in ("broker", "agent"):
                slave.kill(service)
            before = twin.log("agent").count("action=capture ")
            eventually(lambda: twin.log("agent").count("action=capture ") > before, what="the twin has the slot")
            time.sleep(3)
            slave.start()
            # The slave was away last: the twin has its slot, and has confirmed what nobody else will read.
            eventually(lambda: "slot" in (master.node_status(2)["error"] or ""), what="status names the slot")
        finally:
            for thread in threads:
                thread.stop()
        assert witness.looks > 5
        twin.stop()
        bank.step()
        cluster.wait()
        cluster.assert_equal(BANK_TABLES)
        eventually(lambda: master.node_status(2)["state"] == "A", what="the node that is left is well")
