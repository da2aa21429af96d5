"""Whatever strangers, peers and local processes send, a broker lives on, answers nobody it should not, and changes
nothing."""

from __future__ import annotations

import os
import random
import secrets
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from broker.cluster.state_directory import StateDirectory
from broker.net.loop import Socket
from pmgsync.core.positions import LAST
from pmgsync.errors import PmgsyncError
from pmgsync.wire.messages import pack
from tests.harness.brokers import (
    INCARNATION,
    MEMORY_MIB,
    START,
    FaultyBroker,
    Receiver,
    Source,
    make_transactions,
    running_brokers,
    until,
)
from tests.harness.strangers import connected, greeting, nonsense, stranger, unharmed

pytestmark = pytest.mark.cluster


ROUNDS = int(os.environ.get("PMGSYNC_ROUNDS", "1"))


PORTS = ["events", "control", "join"]


# -- bytes from strangers ---------------------------------------------------------------------------------------------


def raw_attacks(rng: random.Random) -> list[bytes]:
    """Return what is sent to a port by something that does not speak its protocol, or only a little."""
    curve, null = greeting(b"CURVE"), greeting(b"NULL")
    long_frame = b"\x06" + struct.pack(">Q", 1 << 62)
    return [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        *(rng.randbytes(rng.randrange(1, 5000)) for _ in range(20)),
        *(b"\xff" + rng.randbytes(rng.randrange(1, 200)) for _ in range(20)),
        *(mechanism[:cut] for mechanism in (curve, null) for cut in (1, 10, 11, 12, 33, 63)),
        *(mechanism + rng.randbytes(rng.randrange(1, 500)) for mechanism in (curve, null) for _ in range(10)),
        curve + long_frame,
        null + long_frame,
        curve + b"\x02" + struct.pack(">Q", (1 << 63) + 5) + b"x",
        curve + b"\x04\x05\x05HELLO",
        curve + b"\x04\xc8\x05HELLO" + rng.randbytes(194),
        curve + b"\x04\xff\x08INITIATE" + rng.randbytes(246),
        null + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB",
        greeting(b"PLAIN") + b"\x04\x10\x05HELLO\x04user\x04pass",
    ]


def throw(address: Any, data: bytes, *, family: int = socket.AF_INET) -> socket.socket:
    """Connect, send, and return the connection, still open."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(address)
    with suppress(OSError):
        connection.sendall(data)
    return connection


def test_garbage_on_every_port_harms_nobody(one: FaultyBroker) -> None:
    seed = int(os.environ.get("PMGSYNC_SEED") or secrets.randbits(32))
    print(f"PMGSYNC_SEED={seed}")
    rng = random.Random(seed)
    with unharmed(one):
        for _ in range(2 * ROUNDS):
            for data in raw_attacks(rng):
                held = [throw(("127.0.0.1", port), data) for port in one.ports]
                held.append(throw(str(one.run_dir / "broker.sock"), data, family=socket.AF_UNIX))
                for connection in held:
                    connection.close()


def test_a_flood_instead_of_a_handshake_takes_no_memory(one: FaultyBroker) -> None:
    frame = b"\x06" + struct.pack(">Q", 1 << 30)
    with unharmed(one):
        for port in one.ports:
            connection = throw(("127.0.0.1", port), greeting(b"CURVE") + frame)
            with suppress(OSError):
                for _ in range(256):
                    connection.sendall(bytes(1 << 20))
            assert one.rss_mib() < MEMORY_MIB
            connection.close()


@pytest.mark.campaign
def test_thousands_of_connections_harm_nobody(one: FaultyBroker) -> None:
    source = Source(one, random.Random(1), make_transactions(random.Random(1), 50))
    until(lambda: source.told, source.step)
    with unharmed(one):
        for port in one.ports:
            for _ in range(700 * ROUNDS):
                throw(("127.0.0.1", port), b"").close()
        held = [throw(("127.0.0.1", port), greeting(b"CURVE")) for port in one.ports for _ in range(200)]
        until(lambda: source.durable.lsn == source.transactions[-1].lsn, source.step, what="capture is served")
        for connection in held:
            # The broker ends what does not get on with its handshake.
            connection.settimeout(15)
            with suppress(OSError):
                while connection.recv(1000):
                    pass
            connection.close()


# -- keys that are not members' ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["CURVE", "NULL"])
def test_a_stranger_on_events_and_control_gets_nothing(one: FaultyBroker, tmp_path: Path, mechanism: str) -> None:
    server_key = one.member().curve_key
    keys = stranger(tmp_path) if mechanism == "CURVE" else None
    with (
        unharmed(one),
        connected(zmq.SUB, keys, server_key, one.ports[0]) as events,
        connected(zmq.DEALER, keys, server_key, one.ports[1]) as control,
        connected(zmq.DEALER, keys, server_key, one.ports[1]) as other,
    ):
        for n in range(20):
            with suppress(zmq.Again):
                control.send(pack({"op": "document", "id": n}), zmq.NOBLOCK)
                other.send(os.urandom(100), zmq.NOBLOCK)
        # Heartbeats come twice a second to whoever may hear them.
        assert not events.poll(1500)
        assert not control.poll(200)
        assert not other.poll(0)


def test_nonsense_from_a_member_harms_nobody(tmp_path: Path) -> None:
    seed = int(os.environ.get("PMGSYNC_SEED") or secrets.randbits(32))
    print(f"PMGSYNC_SEED={seed}")
    rng = random.Random(seed)
    with running_brokers(tmp_path, 2) as (one, two):
        source = Source(one, rng, make_transactions(rng, 60))
        receiver = Receiver(two)
        until(lambda: len(receiver.ledger.transactions) >= 10, lambda: source.step(1), receiver.step)
        keys = StateDirectory(two.state_dir).keys()
        with unharmed(one), connected(zmq.DEALER, keys, one.member().curve_key, one.ports[1]) as control:
            for parts in nonsense(rng):
                control.send_multipart(parts)
                while control.poll(0):
                    control.recv_multipart()
            _ask_for_everything(control)
        until(lambda: len(receiver.ledger.transactions) == 60, source.step, receiver.step)
        assert receiver.ledger.transactions == source.transactions


def test_a_request_that_is_too_long_costs_a_member_its_connection_and_nobody_else_anything(tmp_path: Path) -> None:
    rng = random.Random(1)
    with running_brokers(tmp_path, 2) as (one, two):
        source, receiver = Source(one, rng, make_transactions(rng, 60)), Receiver(two)
        until(lambda: len(receiver.ledger.transactions) >= 10, lambda: source.step(1), receiver.step)
        keys = StateDirectory(two.state_dir).keys()
        ping = {"op": "ping", "id": 1}
        for size in (2 << 20, 64 << 20):
            with unharmed(one), connected(zmq.DEALER, keys, one.member().curve_key, one.ports[1]) as control:
                control.send(pack(ping))
                assert control.poll(5000), "a member is answered"
                control.recv_multipart()
                control.send(pack({"op": "ping", "id": 2, "more": bytes(size)}))
                assert not control.poll(1000), "what is longer than the limit is not read"
        until(lambda: len(receiver.ledger.transactions) == 60, source.step, receiver.step)
        assert receiver.ledger.transactions == source.transactions


def _ask_for_everything(control: Socket) -> None:
    """Open more streams than are allowed, and see that it is refused and that the broker still answers."""
    while control.poll(300):
        control.recv_multipart()
    for n in range(100):
        replay = {"op": "replay", "id": 1000 + n, "origin": 1, "incarnation": INCARNATION, "credit": 0}
        control.send(pack({**replay, "position": [START, LAST]}))
    refused = []
    while control.poll(1000):
        answer = msgpack.unpackb(control.recv_multipart()[0])
        if answer["op"] == "error":
            refused.append(answer)
        if len(refused) == 36:
            break
    assert len(refused) == 36
    assert "64" in refused[0]["message"]


def test_nonsense_from_a_local_process_harms_nobody(tmp_path: Path) -> None:
    seed = int(os.environ.get("PMGSYNC_SEED") or secrets.randbits(32))
    print(f"PMGSYNC_SEED={seed}")
    rng = random.Random(seed)
    with running_brokers(tmp_path, 2) as (one, two):
        source = Source(one, rng, make_transactions(rng, 60))
        receiver = Receiver(two)
        until(lambda: len(receiver.ledger.transactions) >= 10, lambda: source.step(1), receiver.step)
        with unharmed(two):
            link = two.link("cli")
            # A process of the same user may do what it likes; what is checked is that nothing it says ends the broker.
            changing = {b"chain.open", b"apply.open", b"applied", b"hello", b"frame"}
            for parts in nonsense(rng):
                if not any(op in parts[0] for op in changing):
                    link.put(parts)
                for _ in link.pending():
                    pass
            link = two.link("cli")
            for position in ([150, 3], [0, 1]):
                request = {"op": "apply.open", "origin": 1, "incarnation": INCARNATION, "position": position}
                with pytest.raises(PmgsyncError, match="middle of a transaction"):
                    link.request({**request, "credit": 1})
            with pytest.raises(PmgsyncError, match="own chain"):
                link.request({**request, "origin": 2, "credit": 1})
        until(lambda: len(receiver.ledger.transactions) == 60, source.step, receiver.step)
        assert receiver.ledger.transactions == source.transactions


def test_a_local_process_that_reads_nothing_is_given_up_and_nonsense_ends_its_connection(one: FaultyBroker) -> None:
    path = str(one.run_dir / "broker.sock")
    for data in (struct.pack(">I", 0), struct.pack(">2I", 1, 0xFFFF_FFFF), b"GET / HTTP/1.1\r\n\r\n"):
        with unharmed(one), throw(path, data, family=socket.AF_UNIX) as connection:
            assert connection.recv(1) == b"", "the connection is ended"
    with unharmed(one), throw(path, b"", family=socket.AF_UNIX) as deaf:
        hello = pack({"op": "hello", "id": 1, "worker": "cli", "pid": 0})
        deaf.settimeout(20)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            for _ in range(2_000_000):
                deaf.sendall(struct.pack(">2I", 1, len(hello)) + hello)
        assert one.rss_mib() < MEMORY_MIB
