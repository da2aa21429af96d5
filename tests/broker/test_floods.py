"""Connections by the thousand, from one address: they take neither descriptors nor memory, and members get through."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import zmq

from broker.net.incoming import TOO_MANY, WAITING_OF_ADDRESS
from pmgsync.errors import UnreachableError
from tests.harness.brokers import (
    MEMORY_MIB,
    FaultyBroker,
    Receiver,
    Source,
    make_transactions,
    running_brokers,
    until,
)
from tests.harness.cluster import eventually
from tests.harness.strangers import answers_status, connected, greeting, stranger, unharmed

pytestmark = pytest.mark.cluster

FEW_DESCRIPTORS = 256
WITH_FEW_DESCRIPTORS = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({FEW_DESCRIPTORS}, {FEW_DESCRIPTORS}))
from broker.main import run
run()
"""


def open_at(broker: FaultyBroker, port: int) -> int:
    """Return how many connections a broker has at one of its ports."""
    assert broker.process is not None
    found = psutil.Process(broker.process.pid).net_connections("tcp")
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in found)


def all_ports(broker: FaultyBroker) -> list[int]:
    return [*broker.ports, broker.key_port]


def connect(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    with suppress(OSError):
        connection.sendall(data)
    return connection


@contextmanager
def flooded(ports: Sequence[int], *, hold: int) -> Iterator[list[int]]:
    """Open connections as fast as possible, hold the newest, and yield how many there were."""
    rng, over, count = random.Random(5), threading.Event(), [0]
    sent = [b"", greeting(b"CURVE"), greeting(b"NULL"), b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(200)]

    def flood() -> None:
        held: list[socket.socket] = []
        while not over.is_set():
            with suppress(OSError):
                held.append(connect(rng.choice(ports), rng.choice(sent)))
                count[0] += 1
            if len(held) > hold:
                held.pop(0).close()
        for connection in held:
            connection.close()

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join(20)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "data", [pytest.param(b"", marks=pytest.mark.campaign), greeting(b"CURVE")], ids=["silent", "half"]
)
def test_one_address_has_so_many_connections_and_the_newest_stay(one: FaultyBroker, data: bytes) -> None:
    with unharmed(one):
        for name, port in zip(("events", "control", "join", "key"), all_ports(one), strict=True):
            with ExitStack() as held:
                for _ in range(3 * WAITING_OF_ADDRESS):
                    newest = held.enter_context(connect(port, data))
                eventually(lambda: open_at(one, port) <= WAITING_OF_ADDRESS, within_s=3)  # noqa: B023
                assert (name, TOO_MANY) in one.refused()
                newest.settimeout(2)
                assert newest.recv(100), "the newest is served"


@pytest.mark.campaign
def test_strangers_that_finish_their_handshake_at_the_door_are_as_limited(one: FaultyBroker, tmp_path: Path) -> None:
    """The handshake ends there with success, so no time-out of libzmq ends such a connection."""
    keys, key = stranger(tmp_path), one.member().curve_key
    with unharmed(one), ExitStack() as held:
        for _ in range(WAITING_OF_ADDRESS + 60):
            held.enter_context(connected(zmq.DEALER, keys, key, one.ports[2]))
        eventually(lambda: ("join", TOO_MANY) in one.refused(), within_s=20)
        assert open_at(one, one.ports[2]) <= WAITING_OF_ADDRESS + 1


def test_members_get_through_while_an_address_floods_every_port(tmp_path: Path) -> None:
    """From the members' own address, which is the worst case."""
    with running_brokers(tmp_path, 2) as (one, two):
        rng = random.Random(2)
        source, receiver = Source(one, rng, make_transactions(rng, 400)), Receiver(two)
        until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
        with unharmed(one), flooded(all_ports(one), hold=2 * WAITING_OF_ADDRESS) as count:
            until(lambda: count[0] > 500, source.step, receiver.step)
            two.kill()
            two.start()
            until(lambda: len(receiver.ledger.transactions) == 400, source.step, receiver.step)
            until(lambda: count[0] > 1000, source.step, receiver.step)
            assert one.rss_mib() < MEMORY_MIB
        assert receiver.ledger.transactions == source.transactions


def test_a_broker_with_few_descriptors_never_runs_out_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyBroker, "program", ("-c", WITH_FEW_DESCRIPTORS))
    with running_brokers(tmp_path, 2) as (one, two):
        eventually(lambda: answers_status(one) and answers_status(two), what="they serve")
        eventually(lambda: one.status()[2]["heartbeat_age_s"] is not None)
        assert f"action=few-descriptors limit={FEW_DESCRIPTORS}" in one.log()
        with unharmed(one), ExitStack() as held:
            for port in all_ports(one):
                for _ in range(FEW_DESCRIPTORS):
                    held.enter_context(connect(port, greeting(b"CURVE")))
            assert psutil.Process(one.process.pid if one.process else 0).num_fds() < FEW_DESCRIPTORS
            assert one.status()[2]["heartbeat_age_s"] < 3
            assert two.alive


def changed_keys(broker: FaultyBroker) -> bool:
    """Have a slave change its keys, which closes its ports and opens them again; False while the master is away."""
    key, link = broker.member().curve_key, broker.link("cli")
    try:
        link.request({"op": "member.update", "keys": True}, timeout_s=30)
    except UnreachableError:
        return False
    finally:
        broker.links.remove(link)
        link.close()
    return broker.member().curve_key != key


@pytest.mark.parametrize("changes", [3, pytest.param(40, marks=pytest.mark.campaign)])
def test_ports_are_closed_and_opened_in_a_flood(tmp_path: Path, changes: int) -> None:
    """libzmq's thread tells of each connection under a lock that closing the port needs, too."""
    with running_brokers(tmp_path, 2) as (one, two):
        eventually(lambda: answers_status(one) and answers_status(two), what="they serve")
        eventually(lambda: one.status()[2]["heartbeat_age_s"] is not None)
        with flooded([*all_ports(one), *all_ports(two)], hold=100) as count:
            for _ in range(changes):
                before = count[0]
                eventually(lambda: changed_keys(two), what="its keys are changed")
                eventually(lambda: count[0] > before + 100, what="the flood goes on")  # noqa: B023
            assert one.alive
            assert two.alive
        for broker, other in ((one, 2), (two, 1)):
            eventually(lambda: (broker.status()[other]["heartbeat_age_s"] or 9) < 3)  # noqa: B023
        assert one.rss_mib() < MEMORY_MIB
