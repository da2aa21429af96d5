"""Whatever strangers, peers and local processes send, a broker lives on, answers nobody it should not, and changes
nothing."""

from __future__ import annotations

import os
import random
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from broker.cluster.attempts import MAX_OF_ADDRESS
from broker.cluster.door_client import DoorClient, fetch_key
from broker.cluster.key_port import KNOWN_PUBLIC
from broker.cluster.state_directory import StateDirectory
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.membership import Member, sign
from pmgsync.core.positions import LAST
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnreachableError
from pmgsync.wire.link import Peer
from pmgsync.wire.messages import pack
from tests.harness.brokers import (
    INCARNATION,
    MEMORY_MIB,
    START,
    FaultyBroker,
    Receiver,
    Source,
    document_of,
    make_transactions,
    running_brokers,
    until,
)
from tests.harness.cluster import eventually, free_ports

pytestmark = pytest.mark.cluster

ROUNDS = int(os.environ.get("PMGSYNC_ROUNDS", "1"))
PORTS = ["events", "control", "join"]
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"


def greeting(mechanism: bytes) -> bytes:
    """Return the 64 bytes that a ZMTP 3 connection begins with."""
    return GREETING + mechanism.ljust(20, b"\0") + bytes(32)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[FaultyBroker]:
    """A cluster of one."""
    with running_brokers(tmp_path, 1) as (broker,):
        eventually(lambda: _answers(broker), what="the broker serves")
        yield broker


def _answers(broker: FaultyBroker) -> bool:
    try:
        return bool(broker.status())
    except PmgsyncError:
        return False


@contextmanager
def unharmed(broker: FaultyBroker) -> Iterator[None]:
    """Check that a broker lives on, answers, has not grown, and has the same document as before."""
    assert broker.process is not None
    pid, before, document = broker.process.pid, broker.rss_mib(), StateDirectory(broker.state_dir).document()
    yield
    assert broker.alive
    assert broker.process.pid == pid
    assert _answers(broker)
    grown = broker.rss_mib() - before
    print(f"grown by {grown:.0f} MiB")
    assert grown < 64
    assert StateDirectory(broker.state_dir).document() == document


def stranger(directory: Path) -> NodeKeys:
    """Return the keys of nobody's."""
    return StateDirectory(directory / f"stranger-{secrets.token_hex(4)}").keys()


@contextmanager
def connected(
    kind: int, keys: NodeKeys | None, server_key: bytes, port: int, *, wait_s: float = 0.0
) -> Iterator[Socket]:
    """A socket connected to a broker's port; without keys, by the NULL mechanism."""
    context: zmq.Context[Socket] = zmq.Context()
    try:
        opened = sockets.open_socket(context, kind, max_bytes=1 << 20)
        if kind == zmq.SUB:
            opened.subscribe(b"")
        if keys is None:
            opened.connect(f"tcp://127.0.0.1:{port}")
        else:
            sockets.connect(opened, keys, server_key, "127.0.0.1", port)
        yield opened
    finally:
        context.destroy(linger=0)


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


def test_another_key_than_the_documents_is_a_named_problem(tmp_path: Path) -> None:
    brokers = [FaultyBroker(tmp_path, name) for name in ("node1", "node2")]
    try:
        right = document_of(brokers).document
        wrong = replace(
            right, members=(right.members[0], replace(right.members[1], curve_key=stranger(tmp_path).curve_public))
        )
        state = StateDirectory(brokers[0].state_dir)
        state.store_document(sign(wrong, 1, state.keys().sign_private))
        StateDirectory(brokers[1].state_dir).store_document(sign(right, 1, state.keys().sign_private))
        for broker in brokers:
            broker.start()
        eventually(lambda: _answers(brokers[0]) and _answers(brokers[1]))
        eventually(lambda: "key" in brokers[0].status()[2]["error"], within_s=10, what="the wrong key is named")
        eventually(lambda: "refuses this node's key" in brokers[1].status()[1]["error"], within_s=10)
    finally:
        for broker in brokers:
            broker.close()


# -- members and local processes that send nonsense -------------------------------------------------------------------


def nonsense(rng: random.Random) -> list[list[bytes]]:
    """Return control messages that are wrong in every field."""
    values: list[Any] = [
        None, True, -1, 0, 1, 2**63, 2**64 - 1, 1.5, float("nan"), "", "x" * 300, b"", [], [1], {}, {"a": []},
        [[]], [1, 2], [2**40, 0], [2**40, 7], [-1, 5], {1: [77, 100, 5]}, {"1": 2},
    ]  # fmt: skip
    ops = [
        "hello", "report", "frame", "watermark", "applied", "chain.open", "apply.open", "serve", "call", "status",
        "token", "replay", "credit", "cancel", "ack", "document", "data", "done", "error", "end", "ping", "pong",
        "admit", "check", "reload!", "",
    ]  # fmt: skip
    keys = [
        "id", "origin", "incarnation", "position", "credit", "bytes", "applied", "durable", "epoch", "method", "args",
        "target", "methods", "lsn", "start", "snapshot", "ttl_s", "state", "error", "hint", "alerts", "message",
        "counters",
    ]  # fmt: skip
    messages: list[list[bytes]] = [[b""], [b"\xc1"], [b"\x01"], [b"\x80"], [b"\x90" * 2000], [b"\x81" * 2000]]
    for op in ops:
        messages.append([pack({"op": op})])
        messages += [[pack({"op": op, "id": value})] for value in values]
        for _ in range(12):
            body = {key: rng.choice(values) for key in rng.sample(keys, rng.randrange(1, len(keys)))}
            parts = [rng.randbytes(rng.randrange(50)) for _ in range(rng.randrange(4))]
            messages.append([pack({"id": 1, **body, "op": op}), *parts])
    messages += [[msgpack.packb({"op": value})] for value in values]
    messages += [[rng.randbytes(rng.randrange(200))] for _ in range(200)]
    return messages


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
                    link.socket.send_multipart(parts)
                while link.socket.poll(0):
                    link.socket.recv_multipart()
            link = two.link("cli")
            for position in ([150, 3], [0, 1]):
                request = {"op": "apply.open", "origin": 1, "incarnation": INCARNATION, "position": position}
                with pytest.raises(PmgsyncError, match="middle of a transaction"):
                    link.request({**request, "credit": 1})
            with pytest.raises(PmgsyncError, match="own chain"):
                link.request({**request, "origin": 2, "credit": 1})
        until(lambda: len(receiver.ledger.transactions) == 60, source.step, receiver.step)
        assert receiver.ledger.transactions == source.transactions


# -- the join door ----------------------------------------------------------------------------------------------------


def new_token(broker: FaultyBroker, *, ttl_s: int = 60) -> str:
    """Return a join token of a broker."""
    cli = broker.link("cli")
    answer, _ = cli.request({"op": "token", "ttl_s": ttl_s})
    return str(answer["token"])


def newcomer(keys: NodeKeys, name: str = "newcomer", **other: Any) -> Member:
    """Return a node that would like to join."""
    events, control, join = free_ports(3)
    member = Member(1, name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)
    return replace(member, **other)


@contextmanager
def at_the_door(broker: FaultyBroker, keys: NodeKeys) -> Iterator[DoorClient]:
    with DoorClient("127.0.0.1", broker.ports[2], broker.member().curve_key, keys) as door:
        yield door


def ask_raw(broker: FaultyBroker, keys: NodeKeys, *messages: list[bytes]) -> list[dict[str, Any]]:
    """Send messages to the door as they are and return the answers."""
    answers = []
    with connected(zmq.DEALER, keys, broker.member().curve_key, broker.ports[2]) as door:
        for parts in messages:
            door.send_multipart(parts)
            assert door.poll(10_000), parts
            answers.append(msgpack.unpackb(door.recv_multipart()[0]))
    return answers


def test_the_door_refuses_and_says_why(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    with unharmed(one):
        expiring = new_token(one, ttl_s=1)
        with at_the_door(one, keys) as door:
            with pytest.raises(MembershipError, match="does not accept this token"):
                door.admit("A" * 26, newcomer(keys))
            with pytest.raises(MembershipError, match="does not accept this token"):
                # Who has no token does not learn which names are taken.
                door.admit("A" * 26, newcomer(keys, "node1"))
            token = new_token(one)
            with pytest.raises(MembershipError, match="called node1 already"):
                door.admit(token, newcomer(keys, "node1"))
            with pytest.raises(MembershipError, match="not the key of the connection"):
                door.admit(token, newcomer(stranger(tmp_path)))
            with pytest.raises(UnreachableError):
                door.check(token=token)  # no agent runs here that could tell the facts
            time.sleep(1.1)  # the token's time is what is waited for
            with pytest.raises(MembershipError, match="does not accept this token"):
                door.admit(expiring, newcomer(keys))
        (answer,) = ask_raw(one, keys, [pack({"op": "admit", "id": 1, "token": token, "version": 2})])
        assert "version" in answer["message"]
        good = newcomer(keys).to_map() | {"curve_key": keys.curve_public, "sign_key": keys.sign_public}
        for field, value in [("name", "x y"), ("address", "a b"), ("events", 0), ("join", "7"), ("sign_key", b"short")]:
            request = {**good, "op": "admit", "id": 1, "token": token, "version": 1, field: value}
            (answer,) = ask_raw(one, keys, [pack(request)])
            assert answer["op"] == "error"


def test_a_token_lets_one_node_in_once(one: FaultyBroker, tmp_path: Path) -> None:
    token = new_token(one)
    racers = [stranger(tmp_path) for _ in range(4)]
    context: zmq.Context[Socket] = zmq.Context()
    try:
        peers = []
        for keys in racers:
            racing = sockets.open_socket(context, zmq.DEALER, max_bytes=1 << 20)
            sockets.connect(racing, keys, one.member().curve_key, "127.0.0.1", one.ports[2])
            peers.append(Peer(racing, "the door"))
        for n, (keys, peer) in enumerate(zip(racers, peers, strict=True)):
            member = newcomer(keys, f"racer{n}").to_map()
            member |= {"curve_key": keys.curve_public, "sign_key": keys.sign_public}
            peer.send({**member, "op": "admit", "id": 1, "token": token, "version": 1})
        answers = []
        for peer in peers:
            received = peer.receive(10)
            assert received is not None
            answers.append(received[0])
        assert sorted(answer["op"] for answer in answers) == ["admitted", "error", "error", "error"]
        assert {answer["error"] for answer in answers if answer["op"] == "error"} == {"bad_token"}
    finally:
        context.destroy(linger=0)
    held = StateDirectory(one.state_dir).document()
    assert held is not None
    assert len(held.document.members) == 2


def test_guessing_at_tokens_closes_the_door(one: FaultyBroker, tmp_path: Path) -> None:
    keys, token = stranger(tmp_path), new_token(one)
    with unharmed(one):
        guesses = [[pack({"op": "check", "id": n, "token": f"{n:026}"})] for n in range(15)]
        answers = ask_raw(one, keys, *guesses)
        refused = ["bad_token"] * MAX_OF_ADDRESS + ["too_many_attempts"] * (15 - MAX_OF_ADDRESS)
        assert [answer["error"] for answer in answers] == refused
        with at_the_door(one, keys) as door, pytest.raises(MembershipError, match="too many wrong"):
            door.admit(token, newcomer(keys))


def test_nonsense_at_the_door_harms_nobody(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    with unharmed(one):
        with connected(zmq.DEALER, keys, one.member().curve_key, one.ports[2]) as door:
            for parts in nonsense(random.Random(3)):
                door.send_multipart(parts)
                while door.poll(0):
                    door.recv_multipart()
        with connected(zmq.DEALER, keys, one.member().curve_key, one.ports[2]) as door:
            door.send(pack({"op": "check", "id": 1, "token": "x" * (65 << 10)}))
            assert not door.poll(1000), "a message of more than 64 KiB ends the connection"


def test_who_is_not_master_lets_nobody_in(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 2) as (_, two):
        eventually(lambda: _answers(two))
        keys = stranger(tmp_path)
        with pytest.raises(PmgsyncError, match="not master"):
            new_token(two)
        with pytest.raises(UnreachableError), at_the_door(two, keys) as door:
            door.admit("A" * 26, newcomer(keys))


@pytest.mark.parametrize("address", ["-x", ".", "%", "_.y", "a:b", "nowhere.invalid"])
def test_a_member_whose_address_is_none_stops_nobody(one: FaultyBroker, tmp_path: Path, address: str) -> None:
    keys = stranger(tmp_path)
    with at_the_door(one, keys) as door:
        cid, _ = door.admit(new_token(one), newcomer(keys, address=address))
    assert _answers(one)
    assert one.status()[cid]["state"] == "S", "it is joining"


def test_the_key_port_tells_the_key_and_nothing_else(one: FaultyBroker, tmp_path: Path) -> None:
    with unharmed(one):
        assert fetch_key("127.0.0.1", one.key_port) == one.member().curve_key
        with connected(zmq.DEALER, stranger(tmp_path), KNOWN_PUBLIC, one.key_port) as port:
            for op in ("check", "admit", "document", "status", "replay"):
                port.send(pack({"op": op, "id": 1, "token": new_token(one)}))
                assert port.poll(5000)
                assert msgpack.unpackb(port.recv_multipart()[0])["error"] == "unknown_op"
            for parts in nonsense(random.Random(4)):
                port.send_multipart(parts)
        with pytest.raises(ProtocolError, match="is not the key port"):
            fetch_key("127.0.0.1", one.ports[2])


def test_a_joining_node_has_proved_itself_and_a_member_is_not_admitted_twice(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    with at_the_door(one, keys) as door:
        cid, signed = door.admit(new_token(one), newcomer(keys))
        assert signed.document.joining == {cid}
        again, _ = door.admit("", newcomer(keys))
        assert again == cid, "an interrupted join is taken up without another token"
        other, signed = door.admit("", newcomer(keys, "renamed"))
        assert other == cid + 1, "a CID is never used twice"
        assert signed.document.member(cid) is None
    master = one.member()
    with connected(zmq.DEALER, keys, master.curve_key, one.ports[1]) as control:
        control.send(pack({"op": "join.progress", "phase": "copying", "bytes": 5, "rows": 1, "bytes_total": 10}))
        eventually(lambda: one.status()[other]["joining"]["bytes"] == 5, what="its progress is shown")
        assert one.status()[other]["state"] == "S"
        control.send(pack({"op": "join.done", "id": 7}))
        assert control.poll(5000)
        assert msgpack.unpackb(control.recv_multipart()[0]) == {"op": "done", "id": 7, "result": {}}
        assert one.status()[other]["joining"] is None
    with at_the_door(one, keys) as door, pytest.raises(MembershipError, match="does not accept"):
        door.admit("", newcomer(keys, "renamed"))
    with at_the_door(one, keys) as door, pytest.raises(MembershipError, match="already"):
        door.admit(new_token(one), newcomer(keys, "renamed"))


def test_a_node_that_gives_up_joining_leaves_nothing(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    token = new_token(one)
    with at_the_door(one, keys) as door:
        cid, _ = door.admit(token, newcomer(keys))
    with connected(zmq.DEALER, keys, one.member().curve_key, one.ports[1]) as control:
        control.send(pack({"op": "join.abandoned"}))
        eventually(lambda: cid not in one.status(), what="it is no member any more")
    with at_the_door(one, keys) as door:
        again, _ = door.admit(token, newcomer(keys))
    assert again == cid + 1
