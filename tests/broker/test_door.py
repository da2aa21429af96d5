"""The join door and the key port, for those who may come in and for those who may not."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from pmgsync.core.membership import Member
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnreachableError
from pmgsync.wire.dealer import DealerPeer
from pmgsync.wire.messages import pack
from tests.harness.brokers import (
    FaultyBroker,
    running_brokers,
)
from tests.harness.cluster import eventually, free_ports
from tests.harness.strangers import answers_status, connected, nonsense, stranger, unharmed

pytestmark = pytest.mark.cluster


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
                door.check(newcomer(keys), token=token)  # no agent runs here that could tell the facts
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
            peers.append(DealerPeer(racing, "the door"))
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


@pytest.mark.campaign
def test_a_token_lets_one_node_in_once_also_while_the_cluster_cannot_be_changed(tmp_path: Path) -> None:
    keys = [stranger(tmp_path) for _ in range(4)]
    with running_brokers(tmp_path, 3) as brokers, ExitStack() as stack:
        master, *others = brokers
        first, shared, expiring = new_token(master), new_token(master), new_token(master, ttl_s=2)
        eventually(lambda: master.status_map()["lease"]["acknowledged"] == [1, 2, 3], what="all have the document")
        for broker in others:
            broker.signal(signal.SIGSTOP)
        doors = []
        for number, (key, token) in enumerate(zip(keys, (first, shared, shared, expiring), strict=True)):
            door = stack.enter_context(connected(zmq.DEALER, key, master.member().curve_key, master.ports[2]))
            member = newcomer(key, f"newcomer{number}").to_map()
            member |= {"curve_key": key.curve_public, "sign_key": key.sign_public}
            door.send(pack({**member, "op": "admit", "id": 1, "token": token, "version": 1}))
            doors.append(door)
            if not number:
                # From here on the document waits for a majority, and those that follow wait for it.
                eventually(lambda: len(master.status()) == 4, what="the first is admitted")
        time.sleep(2.1)  # the last token's time is what is waited for
        new_token(master)
        assert not any(door.poll(0) for door in doors)
        for broker in others:
            broker.signal(signal.SIGCONT)
        answers = [msgpack.unpackb(door.recv_multipart()[0]) for door in doors if door.poll(15_000)]
        assert [answer["op"] for answer in answers] == ["admitted", "admitted", "error", "error"], answers
        assert {answer["error"] for answer in answers[2:]} == {"bad_token"}
        assert master.alive
        assert len(master.status()) == 5


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
        eventually(lambda: answers_status(two))
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
    assert answers_status(one)
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
