"""Strangers at a broker's ports, and a check that they have harmed nobody."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import zmq

from broker.cluster.state_directory import StateDirectory
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.membership import Member
from pmgsync.errors import PmgsyncError
from pmgsync.wire.messages import pack
from tests.harness.brokers import FaultyBroker, document_of
from tests.harness.cluster import eventually, free_ports

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"


def greeting(mechanism: bytes) -> bytes:
    """Return the 64 bytes that a ZMTP 3 connection begins with."""
    return GREETING + mechanism.ljust(20, b"\0") + bytes(32)


def answers_status(broker: FaultyBroker) -> bool:
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
    assert answers_status(broker)
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


@contextmanager
def brokers_and_a_key(directory: Path, count: int) -> Iterator[tuple[list[FaultyBroker], NodeKeys]]:
    """Run a cluster of brokers with one more member, called `bad`, of which there are only the keys."""
    brokers = [FaultyBroker(directory, f"node{n}") for n in range(1, count + 1)]
    keys = stranger(directory)
    events, control, join = free_ports(3)
    bad = Member(1, "bad", "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)
    try:
        signed = document_of(brokers, bad)
        for broker in brokers:
            StateDirectory(broker.state_dir).store_document(signed)
            broker.start()
        eventually(lambda: all(answers_status(broker) for broker in brokers))
        yield brokers, keys
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
