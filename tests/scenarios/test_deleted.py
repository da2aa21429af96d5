"""`pmgcm delete`: the node's connections end, its key opens nothing, and it learns it, also when it was down."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
import zmq

from broker.cluster.state_directory import StateDirectory
from broker.members.connection import Connection
from broker.net.loop import Loop
from pmgsync.core.membership import SignedDocument
from pmgsync.wire.messages import pack, unpack
from tests.harness.cluster import Node, eventually
from tests.harness.epochs import held
from tests.harness.health import NewCluster, wait_healthy
from tests.harness.ledger import SCHEMA, TABLES, write_profile

pytestmark = pytest.mark.cluster


class Thief:
    """Whoever has the keys of a node: connections to a member, made with them."""

    def __init__(self, node: Node, victim: Node, cid: int) -> None:
        keys = StateDirectory(node.state_dir).keys().current
        member = held(victim).document.member(cid)
        assert member is not None
        self.received: list[list[bytes]] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.loop = Loop()

        def receive(parts: list[zmq.Frame]) -> None:
            self.received.append([part.bytes for part in parts])

        self.events, self.control = (
            Connection(
                self._context, self.loop, keys, member, kind, port,
                receive=receive, begun=lambda: None, ended=lambda: None,
            )
            for kind, port in ((zmq.SUB, member.events), (zmq.DEALER, member.control))
        )  # fmt: skip

    def run(self, seconds: float = 0.05) -> Thief:
        """Let messages come."""
        self.loop.once(seconds, self.loop.stop)
        self.loop.run()
        return self

    def close(self) -> None:
        self.events.close()
        self.control.close()
        self._context.destroy(linger=0)


@contextlib.contextmanager
def thief(node: Node, victim: Node, cid: int) -> Iterator[Thief]:
    made = Thief(node, victim, cid)
    try:
        yield made
    finally:
        made.close()


def told(node: Node) -> dict[str, object]:
    """Return what a node's status says that was removed, {} before it knows."""
    done = node.pmgcm("status", "--json", check=False)
    said = json.loads(done.stdout) if done.stdout else {}
    return said if done.returncode == 1 and said.get("removed") else {}


@pytest.mark.campaign
def test_connections_end_and_the_key_opens_nothing(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path))
    master, slave, leaver = cluster.nodes
    master.sql("INSERT INTO configuration (key) VALUES ('before')")
    cluster.wait()
    leaver.stop()
    with thief(leaver, master, 1) as one, thief(leaver, slave, 2) as two:
        thieves = (one, two)

        def both(condition: Callable[[Thief], object], what: str) -> None:
            eventually(lambda: [bool(condition(each.run())) for each in thieves] == [True, True], what=what)

        both(lambda each: each.control.established and each.received, "they hear heartbeats")
        master.pmgcm("delete", "3", "--yes")
        begun = time.monotonic()
        both(lambda each: not each.events.established, "they are cut")
        print(f"cut on all after {time.monotonic() - begun:.2f} s")
        both(lambda each: each.events.refused, "the key opens nothing")
        for each in thieves:
            each.received.clear()
        master.sql("INSERT INTO configuration (key) VALUES ('secret')")
        both(lambda each: each.control.established, "they are told what they are")
        for each in thieves:
            for number, request in enumerate(({"op": "document"}, {"op": "call", "method": "snapshot"}), 1):
                each.control.socket.send_multipart([pack({**request, "id": number, "credit": 1 << 20, "args": {}})])
                each.run(0.5)
            got = [(unpack(parts[0])["op"], parts[1:]) for parts in each.received]
            assert got, "it is not told"
            assert {operation for operation, _ in got} == {"document"}, "more than that it was removed"
            told_by = [SignedDocument.unpack(attached[0]).document for _, attached in got]
            assert all(document.member(3) is None for document in told_by)
    cluster.nodes.remove(leaver)
    wait_healthy(cluster)
    leaver.close()


@pytest.mark.campaign
def test_a_node_that_was_down_learns_it_from_any_member(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(nodes=3, schema=SCHEMA, profile=write_profile(tmp_path))
    master, slave, leaver = cluster.nodes
    master.sql("INSERT INTO configuration (key) VALUES ('before')")
    leaver.sql("INSERT INTO mail VALUES (3, 1, 'before')")
    cluster.wait()
    for service in ("agent", "broker"):
        leaver.kill(service)
    master.pmgcm("delete", "3", "--yes")
    eventually(lambda: held(slave).document.member(3) is None, what="the slave knows it")
    master.kill("broker")
    leaver.start()
    leaver.sql("INSERT INTO mail VALUES (3, 2, 'written when nobody knew')")
    said = eventually(lambda: told(leaver), what="it learns it from the slave")
    assert said["cluster"] == held(slave).document.name
    text = leaver.pmgcm("status", check=False)
    assert text.returncode == 1
    assert "this node was removed from the cluster" in text.stderr
    assert "pmgcm leave" in text.stderr
    eventually(lambda: not leaver.workers(), what="nothing is published any more")
    assert leaver.content("configuration", "key") == ["(before)"], "it can be read"
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        leaver.sql("INSERT INTO configuration (key) VALUES ('no')")
    # It stays so when it is started again, alone.
    leaver.stop()
    leaver.start()
    assert eventually(lambda: told(leaver))
    master.start("broker")
    wait_healthy_of(master, 2)
    leaver.pmgcm(*cluster.join_arguments())
    eventually(lambda: [node["cid"] for node in master.status()["nodes"]] == [1, 2, 4])
    cluster.wait()
    cluster.assert_equal(TABLES)
    assert leaver.content("mail", "key") == ["(before)"], "what was written after that is nobody's"
    wait_healthy(cluster)


def wait_healthy_of(master: Node, count: int) -> None:
    """Wait until all of so many members are active."""
    eventually(lambda: [node["state"] for node in master.status()["nodes"]] == ["A"] * count, what="all are active")
