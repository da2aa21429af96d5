"""Every handshake that fails is named, in status and log, at both ends; and who was refused may be let in later."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from broker.cluster.state_directory import StateDirectory
from broker.net.handshakes import GONE, NO_CURVE, NO_MEMBER, NO_ZMTP, TOO_SLOW, WRONG_SERVER_KEY
from pmgsync.core.membership import Member, SignedDocument, first_document, sign, with_member
from tests.harness.brokers import CLUSTER, FaultyBroker, document_of
from tests.harness.cluster import eventually, free_ports
from tests.harness.fake_member import FakeMember
from tests.harness.strangers import answers_status, connected, greeting, stranger

pytestmark = pytest.mark.cluster


@contextmanager
def started(directory: Path, documents: Sequence[SignedDocument], brokers: Sequence[FaultyBroker]) -> Iterator[None]:
    """Run brokers, each with the document of the same place."""
    try:
        for broker, document in zip(brokers, documents, strict=True):
            StateDirectory(broker.state_dir).store_document(document)
            broker.start()
        eventually(lambda: all(answers_status(broker) for broker in brokers))
        yield
    finally:
        for broker in brokers:
            broker.close()


def error_of(broker: FaultyBroker, cid: int) -> str:
    return str(broker.status()[cid]["error"])


# -- two nodes --------------------------------------------------------------------------------------------------------


def test_another_key_than_the_documents_is_named_by_both(tmp_path: Path) -> None:
    """Node 1 expects another key of node 2 than it has: to node 2 it shows a wrong server key, and it takes node 2's
    own connections for those of a stranger."""
    one, two = brokers = [FaultyBroker(tmp_path, name) for name in ("node1", "node2")]
    right = document_of(brokers)
    other = replace(right.document.members[1], curve_key=stranger(tmp_path).curve_public)
    master = StateDirectory(one.state_dir).keys().sign_private
    wrong = sign(replace(right.document, members=(right.document.members[0], other)), 1, master)
    with started(tmp_path, [wrong, right], brokers):
        eventually(lambda: "its key may not be the one in the cluster document" in error_of(one, 2), within_s=10)
        eventually(lambda: "refuses this node's key: it is not a member's there" in error_of(two, 1), within_s=10)
        eventually(lambda: {("events", NO_MEMBER), ("control", NO_MEMBER)} <= one.refused(), within_s=10)
        eventually(lambda: {("events", WRONG_SERVER_KEY), ("control", WRONG_SERVER_KEY)} <= two.refused(), within_s=10)
        assert "action=link-problem cid=2" in one.log()
        assert "action=link-problem cid=1" in two.log()
        assert f"address=127.0.0.1 count=1 reason={NO_MEMBER}" in one.log()
        assert f"count=1 reason={WRONG_SERVER_KEY}" in two.log()


def test_access_that_is_granted_later_is_picked_up_without_a_restart(tmp_path: Path) -> None:
    """Node 3 has heard that it is a member before node 2 has."""
    fake = FakeMember(tmp_path, "node1", 1)
    two, three = brokers = [FaultyBroker(tmp_path, name) for name in ("node2", "node3")]
    before = with_member(first_document(CLUSTER, "test", "mirror", fake.member()), two.member())
    after = with_member(before, three.member())
    documents = [sign(document, 1, fake.keys.sign_private) for document in (before, after)]
    fake.start([replace(member, cid=cid) for cid, member in enumerate((two.member(), three.member()), 2)])
    try:
        with started(tmp_path, documents, brokers):
            eventually(lambda: "or not yet" in error_of(three, 2), within_s=10, what="node 3 is refused, and says so")
            eventually(lambda: ("events", NO_MEMBER) in two.refused(), within_s=10)
            pids = [broker.process.pid for broker in brokers if broker.process is not None]
            fake.event(b"d", documents[1].pack())
            eventually(lambda: (two.status().get(3) or {}).get("heartbeat_age_s") is not None, within_s=20)
            eventually(lambda: three.status()[2]["heartbeat_age_s"] is not None, within_s=20)
            assert pids == [broker.process.pid for broker in brokers if broker.process is not None]
    finally:
        fake.close()


def test_a_member_of_an_incompatible_version_is_named(tmp_path: Path) -> None:
    one, fake = FaultyBroker(tmp_path, "node1"), FakeMember(tmp_path, "node2", 2, origin=2)
    signed = document_of([one], fake.member())
    fake.habits.heartbeats = False
    fake.start([one.member()])
    beat = fake.heartbeat(cid=2, serial=signed.document.serial).pack().replace(b"\xa1v\x01", b"\xa1v\x02", 1)
    try:
        with started(tmp_path, [signed], [one]):

            def named() -> bool:
                fake.event(b"h", beat)
                return "version 2, this node reads version 1" in error_of(one, 2)

            eventually(named, within_s=10, what="the version is named")
            assert "upgrade the node that runs the older pmgsync" in one.log()
    finally:
        fake.close()


# -- other programs ---------------------------------------------------------------------------------------------------


class WebServer(socketserver.BaseRequestHandler):
    """Answers whatever comes as a web server does."""

    def handle(self) -> None:
        with suppress(OSError):
            self.request.recv(1000)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


class Silent(socketserver.BaseRequestHandler):
    """Takes connections and says nothing."""

    def handle(self) -> None:
        with suppress(OSError):
            while self.request.recv(1000):
                pass


@contextmanager
def listening(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """Run a server of something else, and yield its port."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextmanager
def plain_zeromq() -> Iterator[int]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.PUB)
    yield publisher.bind_to_random_port("tcp://127.0.0.1")
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("serve", "sentence"),
    [
        (lambda: listening(WebServer), "does not speak ZMTP 3: another program"),
        (lambda: listening(Silent), "takes the connection and does not answer"),
        (plain_zeromq, "does not use CURVE"),
    ],
    ids=["a web server", "silence", "plain ZeroMQ"],
)
def test_another_program_where_a_member_should_be_is_named(tmp_path: Path, serve: object, sentence: str) -> None:
    assert callable(serve)
    one, keys = FaultyBroker(tmp_path, "node1"), stranger(tmp_path)
    with serve() as port:
        control, join = free_ports(2)
        away = Member(2, "node2", "127.0.0.1", port, control, join, keys.curve_public, keys.sign_public)
        with started(tmp_path, [document_of([one], away)], [one]):
            eventually(lambda: sentence in error_of(one, 2), within_s=15, what=sentence)
            assert sentence in one.log()


@pytest.mark.campaign
def test_what_lasts_is_logged_once_though_connections_are_made_again_and_again(tmp_path: Path) -> None:
    one, keys = FaultyBroker(tmp_path, "node1"), stranger(tmp_path)
    events, control, join = free_ports(3)
    away = Member(2, "node2", "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)
    with started(tmp_path, [document_of([one], away)], [one]):
        eventually(lambda: one.status()[2]["received"]["reconnects"] >= 2, within_s=40)
        assert one.log().count("action=link-problem") == 2, "one line for events, one for control"


@pytest.mark.parametrize(
    "port", ["control", *(pytest.param(port, marks=pytest.mark.campaign) for port in ("events", "join", "key"))]
)
def test_other_programs_at_a_nodes_ports_are_named(one: FaultyBroker, port: str) -> None:
    number = dict(zip(("events", "control", "join", "key"), (*one.ports, one.key_port), strict=True))[port]
    with ExitStack() as stack:
        web, plain, _ = (stack.enter_context(socket.create_connection(("127.0.0.1", number))) for _ in range(3))
        # libzmq tells of a connection by its descriptor only: of one that has ended already the address is not known.
        eventually(lambda: plain.recv(100), what="the broker has begun with the connections")
        time.sleep(0.5)
        web.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        plain.sendall(greeting(b"NULL"))
        for reason in (NO_CURVE, NO_ZMTP, TOO_SLOW):
            eventually(lambda: (port, reason) in one.refused(), within_s=10, what=reason)  # noqa: B023
            assert f"port={port} address=127.0.0.1 count=1 reason={reason}" in one.log()


def test_a_plain_client_is_named(one: FaultyBroker) -> None:
    with connected(zmq.DEALER, None, b"", one.ports[1]):
        # Whoever of the two sees first that the other is none of its kind goes away.
        eventually(lambda: one.refused() & {("control", NO_CURVE), ("control", GONE)}, within_s=10)


def test_who_looks_whether_a_port_is_open_is_shown_as_gone(one: FaultyBroker) -> None:
    for number in (*one.ports, one.key_port):
        for _ in range(20):
            socket.create_connection(("127.0.0.1", number)).close()
    eventually(lambda: one.refused() == {(port, GONE) for port in ("events", "control", "join", "key")}, within_s=10)
    assert one.log().count(GONE) <= 8, "one line for each port, and one for those whose address was not known any more"
