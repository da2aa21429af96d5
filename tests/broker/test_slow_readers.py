"""Whoever asks and does not read: what waits for him is bounded, and he delays nobody.

Tried: a member that subscribes eight times and never reads; one that subscribes to topics without end; one that asks
for 64 replays on each of eight connections, with more credit than there is memory, and never reads; one that sends the
longest requests as fast as it can; a stranger that asks at the join and the key port and never reads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq

from broker.cluster.key_port import KNOWN_PUBLIC
from broker.net import sockets
from broker.net.incoming import TOO_MUCH
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.positions import LAST
from pmgsync.wire.messages import pack
from tests.harness.brokers import (
    INCARNATION,
    MEMORY_MIB,
    START,
    FaultyBroker,
    Receiver,
    until,
)
from tests.harness.played import BlockSource, blocks
from tests.harness.strangers import brokers_and_a_key, stranger

pytestmark = pytest.mark.cluster

CONNECTIONS = 8
"""Of one member to one port: more are not let in."""


def unread(stack: ExitStack, keys: NodeKeys, kind: int, server_key: bytes, port: int) -> Socket:
    """Connect a socket that takes next to nothing from the network as long as nobody reads from it."""
    context: zmq.Context[Socket] = zmq.Context()
    stack.callback(context.destroy, linger=0)
    socket = sockets.open_socket(context, kind, max_bytes=1 << 30, hwm=1)
    socket.setsockopt(zmq.RCVBUF, 4096)
    socket.setsockopt(zmq.SNDHWM, 1000)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    sockets.connect(socket, keys, server_key, "127.0.0.1", port)
    return socket


def peak_while(broker: FaultyBroker, condition: Callable[[], object], steps: Sequence[Callable[[], object]]) -> float:
    """Keep everybody going until a condition holds; return the most memory that a broker had, in MiB."""
    peak = [broker.rss_mib()]
    until(condition, *steps, lambda: peak.append(broker.rss_mib()))
    print(f"RSS {peak[0]:.0f} MiB at first, {max(peak):.0f} MiB at most")
    return max(peak)


@pytest.mark.campaign
def test_a_member_that_subscribes_and_never_reads(tmp_path: Path) -> None:
    with brokers_and_a_key(tmp_path, 2) as ((one, two), keys), ExitStack() as stack:
        count = 1200
        source, receiver = BlockSource(one, random.Random(), blocks(count)), Receiver(two)
        held = [unread(stack, keys, zmq.SUB, one.member().curve_key, one.ports[0]) for _ in range(CONNECTIONS)]
        until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
        done = lambda: len(receiver.ledger.transactions) == count  # noqa: E731
        assert peak_while(one, done, [source.step, receiver.step]) < MEMORY_MIB
        assert receiver.ledger.transactions == source.transactions
        assert not any(socket.closed for socket in held)


@pytest.mark.campaign
def test_a_member_that_asks_for_replays_and_never_reads(tmp_path: Path) -> None:
    with brokers_and_a_key(tmp_path, 2) as ((one, two), keys), ExitStack() as stack:
        count = 300
        source, receiver = BlockSource(one, random.Random(), blocks(count)), Receiver(two)
        until(lambda: len(receiver.ledger.transactions) >= count // 2, lambda: source.step(2), receiver.step)
        asking = [unread(stack, keys, zmq.DEALER, one.member().curve_key, one.ports[1]) for _ in range(CONNECTIONS)]
        replay = {"op": "replay", "origin": 1, "incarnation": INCARNATION, "position": [START, LAST]}
        for socket in asking:
            for number in range(64):
                socket.send(pack({**replay, "id": number, "credit": 1 << 60}))
        over = time.monotonic() + 4
        done = lambda: len(receiver.ledger.transactions) == count and time.monotonic() > over  # noqa: E731
        # 64 MiB for each connection, until TCP finds that nothing is read there.
        assert peak_while(one, done, [source.step, receiver.step]) < MEMORY_MIB + CONNECTIONS * 64
        assert receiver.ledger.transactions == source.transactions


@pytest.mark.campaign
def test_a_member_that_subscribes_to_everything_there_could_be(tmp_path: Path) -> None:
    """libzmq keeps a table of all topics."""
    with brokers_and_a_key(tmp_path, 2) as ((one, two), keys), ExitStack() as stack:
        count = 300
        source, receiver = BlockSource(one, random.Random(), blocks(count)), Receiver(two)
        until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
        many = unread(stack, keys, zmq.SUB, one.member().curve_key, one.ports[0])
        long = unread(stack, keys, zmq.SUB, one.member().curve_key, one.ports[0])
        long.subscribe(bytes(60 << 10))
        rng, told = random.Random(3), False

        def subscribe() -> None:
            for _ in range(500):
                many.subscribe(rng.randbytes(16) + bytes(500))

        def done() -> bool:
            nonlocal told
            told = told or ("events", TOO_MUCH) in one.refused()
            return told and len(receiver.ledger.transactions) == count

        assert peak_while(one, done, [subscribe, source.step, receiver.step]) < MEMORY_MIB
        assert receiver.ledger.transactions == source.transactions


@pytest.mark.campaign
def test_a_member_that_sends_the_longest_requests_as_fast_as_it_can(tmp_path: Path) -> None:
    with brokers_and_a_key(tmp_path, 2) as ((one, two), keys), ExitStack() as stack:
        count = 300
        source, receiver = BlockSource(one, random.Random(), blocks(count)), Receiver(two)
        until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
        control = unread(stack, keys, zmq.DEALER, one.member().curve_key, one.ports[1])
        long = pack({"op": "ping", "id": 1, "more": bytes((1 << 20) - 100)})
        over = time.monotonic() + 5

        def send() -> None:
            with suppress(zmq.Again):
                for _ in range(100):
                    control.send(long, zmq.NOBLOCK)

        done = lambda: len(receiver.ledger.transactions) == count and time.monotonic() > over  # noqa: E731
        assert peak_while(one, done, [send, source.step, receiver.step]) < MEMORY_MIB
        assert receiver.ledger.transactions == source.transactions


@pytest.mark.parametrize("port", ["join", pytest.param("key", marks=pytest.mark.campaign)])
def test_a_stranger_that_asks_and_never_reads(tmp_path: Path, port: str) -> None:
    with brokers_and_a_key(tmp_path, 1) as ((one,), _), ExitStack() as stack:
        server_key, number = (one.member().curve_key, one.ports[2]) if port == "join" else (KNOWN_PUBLIC, one.key_port)
        asking = [unread(stack, stranger(tmp_path), zmq.DEALER, server_key, number) for _ in range(20)]
        question = pack({"op": "key", "id": 1, "more": bytes(60 << 10)})
        over = time.monotonic() + 4

        def send() -> None:
            for socket in asking:
                with suppress(zmq.Again):
                    for _ in range(20):
                        socket.send(question, zmq.NOBLOCK)

        assert peak_while(one, lambda: time.monotonic() > over, [send]) < MEMORY_MIB
        assert one.status()[1]["heartbeat_age_s"] is not None
