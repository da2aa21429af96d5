"""What a stranger, a deleted member and a bad member can try against a cluster of real brokers: nothing is let in,
no document changes, nobody dies.

Tried here: a deleted member's key on every port, with the connections it had and with new ones; its token, and the
recorded join of another, sent again as messages and as bytes; forged, stolen, older and foreign cluster documents, and
votes; a forced epoch against a voted one of the same number; members of another cluster; structures nested as deep as
Python's stack at every entrance.

Tried elsewhere: garbage, half handshakes, plain ZMTP, messages that are wrong in every field (`test_hostile`); other
programs and keys (`test_handshakes`); thousands of connections (`test_floods`); who does not read
(`test_slow_readers`); guessed and expired tokens, and races for one (`test_door`); frames of another origin or cluster,
damaged and out of order (`test_broker_faults`); all that a document may not change (`tests/pure/test_membership`).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from broker.cluster.door_client import DoorClient
from broker.cluster.key_port import KNOWN_PUBLIC
from broker.cluster.state_directory import StateDirectory
from broker.net.handshakes import NO_MEMBER
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.membership import Member, SignedDocument, first_document, new_epoch, sign, with_member
from pmgsync.core.signed import MAX_DOCUMENT
from pmgsync.errors import MembershipError
from pmgsync.wire.messages import pack
from tests.harness.brokers import FaultyBroker, document_of
from tests.harness.cluster import eventually, free_ports
from tests.harness.fake_member import FakeMember
from tests.harness.strangers import answers_status, brokers_and_a_key, connected, stranger, unharmed

pytestmark = pytest.mark.cluster

BAD = 3
"""CID of the member that is bad, or deleted."""


def held(broker: FaultyBroker) -> SignedDocument:
    signed = StateDirectory(broker.state_dir).document()
    assert signed is not None
    return signed


def delete(broker: FaultyBroker, cid: int) -> None:
    """Delete a member, as soon as the cluster can be changed."""

    def deleted() -> bool:
        link = broker.link("cli")
        try:
            link.request({"op": "member.delete", "cid": cid})
        except MembershipError as error:
            assert error.recoverable, error
            return False
        finally:
            broker.links.remove(link)
            link.close()
        return True

    eventually(deleted, within_s=20, what=f"node {cid} is deleted")


def ask(peer: Socket, message: dict[str, Any], *attachments: bytes) -> dict[str, Any]:
    """Send a message and return the answer to the ping that follows it, or its own."""
    peer.send_multipart([pack(message), *attachments])
    assert peer.poll(10_000), message
    answer: dict[str, Any] = msgpack.unpackb(peer.recv_multipart()[0])
    return answer


# -- a deleted member -------------------------------------------------------------------------------------------------


def test_a_deleted_members_key_opens_nothing(tmp_path: Path) -> None:
    with brokers_and_a_key(tmp_path, 2) as (brokers, keys), ExitStack() as stack:
        had: list[Socket] = []
        old = held(brokers[0])
        for broker in brokers:
            key = broker.member().curve_key
            events = stack.enter_context(connected(zmq.SUB, keys, key, broker.ports[0]))
            control = stack.enter_context(connected(zmq.DEALER, keys, key, broker.ports[1]))
            assert events.poll(10_000), "a member hears heartbeats"
            assert ask(control, {"op": "ping", "id": 1})["op"] == "pong"
            had += [events, control]
        delete(brokers[0], BAD)
        for broker in brokers:
            eventually(lambda: held(broker).document.member(BAD) is None, within_s=10)  # noqa: B023
        with unharmed(brokers[0]), unharmed(brokers[1]):
            for broker in brokers:
                for kind, port in ((zmq.SUB, broker.ports[0]), (zmq.DEALER, broker.ports[1])):
                    had.append(stack.enter_context(connected(kind, keys, broker.member().curve_key, port)))
            for peer in had:
                while peer.poll(0):
                    peer.recv_multipart()  # the document that removed it, and what came before
                if peer.type == zmq.DEALER:
                    for message in ({"op": "document", "id": 1}, {"op": "offer"}, {"op": "ping", "id": 2}):
                        with suppress(zmq.Again):
                            peer.send_multipart([pack(message), old.pack()], zmq.NOBLOCK)
            for broker in brokers:
                eventually(lambda: ("events", NO_MEMBER) in broker.refused(), within_s=10)  # noqa: B023
            heard = [peer for peer in had if peer.type == zmq.SUB]
            for peer in heard:
                while peer.poll(0):
                    peer.recv_multipart()  # what came while it was cut off
            assert not any(peer.poll(1000) for peer in heard), "heartbeats come twice a second to whoever may hear them"
            for peer in had:
                while peer.poll(0):
                    told = msgpack.unpackb(peer.recv_multipart()[0])
                    assert told == {"op": "document", "id": 0}, "it is told that it was removed, and nothing else"
            with connected(zmq.DEALER, keys, brokers[0].member().curve_key, brokers[0].ports[2]) as door:
                assert ask(door, {"op": "check", "id": 1})["error"] == "bad_token"
                assert ask(door, {"op": "admit", "id": 1, "token": ""})["error"] == "bad_token"


def newcomer(keys: NodeKeys, name: str) -> Member:
    events, control, join = free_ports(3)
    return Member(1, name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)


def admission(keys: NodeKeys, name: str, token: str) -> dict[str, Any]:
    """Return what a newcomer says at the door."""
    both = {"curve_key": keys.curve_public, "sign_key": keys.sign_public}
    return {**newcomer(keys, name).to_map(), **both, "op": "admit", "id": 1, "token": token, "version": 1}


def new_token(broker: FaultyBroker) -> str:
    return str(broker.link("cli").request({"op": "token", "ttl_s": 600})[0]["token"])


def test_a_token_is_void_once_its_node_is_a_member(one: FaultyBroker, tmp_path: Path) -> None:
    keys, token = stranger(tmp_path), new_token(one)
    key = one.member().curve_key
    with connected(zmq.DEALER, keys, key, one.ports[2]) as door:
        admitted = ask(door, admission(keys, "newcomer", token))
        assert admitted["op"] == "admitted"
        again = ask(door, admission(keys, "newcomer", token))
        assert again["cid"] == admitted["cid"], "an interrupted join is taken up by the same line"
    with connected(zmq.DEALER, keys, key, one.ports[1]) as control:
        assert ask(control, {"op": "join.done", "id": 1})["op"] == "done"
    delete(one, admitted["cid"])
    one.kill()
    one.start()  # tokens are on disk
    eventually(lambda: answers_status(one))
    with unharmed(one):
        for guest in (keys, stranger(tmp_path)):
            with connected(zmq.DEALER, guest, key, one.ports[2]) as door:
                assert ask(door, admission(guest, "newcomer", token))["error"] == "bad_token"
                assert ask(door, {"op": "check", "id": 2, "token": token})["error"] == "bad_token"


def test_a_token_is_void_once_its_node_was_deleted_while_it_joined(one: FaultyBroker, tmp_path: Path) -> None:
    keys, token = stranger(tmp_path), new_token(one)
    with connected(zmq.DEALER, keys, one.member().curve_key, one.ports[2]) as door:
        admitted = ask(door, admission(keys, "newcomer", token))
        delete(one, admitted["cid"])
        with unharmed(one):
            assert ask(door, admission(keys, "newcomer", token))["error"] == "bad_token"


@contextmanager
def recorded(port: int) -> Iterator[tuple[int, bytearray]]:
    """Stand in front of a port, and yield another port and what clients send to it."""
    sent = bytearray()

    def pass_on(source: socket.socket, target: socket.socket, *, keep: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if keep:
                    sent.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def end(one: socket.socket) -> None:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for source, target in ((client, server), (server, client)):
                    opened.enter_context(source)
                    work = threading.Thread(target=pass_on, args=(source, target), kwargs={"keep": source is client})
                    opened.callback(work.join, 5)
                    opened.callback(end, source)
                    work.start()

    with ExitStack() as opened, socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], sent
        end(listener)
        thread.join(5)


def connection_to(port: int) -> socket.socket | None:
    """Return a connection to a port; None while it is closed, as it is for an instant when somebody is cut off."""
    try:
        return socket.create_connection(("127.0.0.1", port))
    except OSError:
        return None


def test_the_recorded_bytes_of_a_join_open_nothing(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    with recorded(one.ports[2]) as (port, sent):
        with DoorClient("127.0.0.1", port, one.member().curve_key, keys) as door:
            cid, _ = door.admit(new_token(one), newcomer(keys, "newcomer"))
        eventually(lambda: len(sent) > 500, what="all of it was recorded")
    delete(one, cid)
    with unharmed(one):
        for number in (*one.ports, one.key_port):
            with eventually(lambda: connection_to(number), what="the port is open") as connection:  # noqa: B023
                connection.settimeout(10)
                with suppress(ConnectionError):
                    connection.sendall(sent)
                    while connection.recv(65536):
                        pass
        assert f"cid={cid + 1}" not in one.log()


# -- documents and votes ----------------------------------------------------------------------------------------------


def forgeries(signed: SignedDocument, keys: NodeKeys) -> dict[str, tuple[bytes, str]]:
    """Return documents that a member has made, and what is said of each; "" when it is passed over."""
    document, own = signed.document, keys.sign_private
    serial = document.serial
    newer = replace(document, serial=serial + 1)
    without = replace(newer, members=tuple(member for member in document.members if member.cid != 2))
    stolen = replace(sign(without, BAD, own, after=signed), signer=1)
    mine = signed.ballot(2, BAD).sign(BAD, own)
    other = signed.ballot(3, BAD).sign(BAD, own)

    def promoted(*votes: Any) -> bytes:
        new = new_epoch(document, BAD, epoch=2, fork=None, when=0, reason="", votes=votes)
        return sign(new, BAD, own, after=signed).pack()

    usurped = sign(replace(newer, master=BAD), BAD, own, after=signed).pack()
    return {
        "by a member that is not master": (sign(without, BAD, own, after=signed).pack(), "only its master's signature"),
        "in the master's name": (stolen.pack(), "signature of node1 (1) on a cluster document is wrong"),
        "by one who calls himself master": (usurped, "cluster document"),
        "older": (replace(signed, document=replace(document, serial=serial - 1)).pack(), ""),
        "older and signed by nobody": (sign(replace(document, serial=1), BAD, own).pack(), ""),
        "of another cluster": (sign(replace(newer, cluster=os.urandom(16)), BAD, own).pack(), "of another cluster"),
        "a new epoch without votes": (promoted(), "has the votes of 0 members, expected 2 of 3"),
        "one vote": (promoted(mine), "has the votes of 1 members, expected 2 of 3"),
        "one vote twice": (promoted(mine, mine), "has the votes of 1 members"),
        "a vote in another's name": (promoted(mine, replace(mine, cid=2)), "has the votes of 1 members"),
        "a vote of another epoch": (promoted(mine, replace(other, cid=1)), "has the votes of 1 members"),
        "nested": (pack_document(b'{"a":' * 5000), "cannot be read"),
        "nested a little less": (pack_document(b'{"fence":' + b"[" * 900 + b"]" * 900 + b"}"), "nested"),
        "no JSON": (pack_document(b"\xff"), "cannot be read"),
        "nothing": (b"", "malformed"),
        "no document": (msgpack.packb([1, 2, 3]), "is not a body, a signer and a signature"),
        "a bomb": (b"\xdd\xff\xff\xff\xff", "malformed"),
        "longer than one may be": (bytes(MAX_DOCUMENT - 200), "malformed"),
    }


def pack_document(body: bytes) -> bytes:
    packed: bytes = msgpack.packb([body, 1, bytes(64)])
    return packed


def test_no_forged_document_is_taken(tmp_path: Path) -> None:
    with brokers_and_a_key(tmp_path, 2) as (brokers, keys), ExitStack() as stack:
        signed = held(brokers[0])
        for broker in brokers:
            control = stack.enter_context(connected(zmq.DEALER, keys, broker.member().curve_key, broker.ports[1]))
            with unharmed(broker):
                for name, (data, reason) in forgeries(signed, keys).items():
                    control.send_multipart([pack({"op": "offer"}), data])
                    answer = ask(control, {"op": "ping", "id": 1})
                    assert answer["op"] == ("error" if reason else "pong"), name
                    assert not reason or reason in answer["message"], (name, answer)
                    if reason:
                        assert control.poll(10_000)
                        assert msgpack.unpackb(control.recv_multipart()[0])["op"] == "pong"
                    assert held(broker).body == signed.body, name


def test_a_forced_epoch_gives_way_to_a_voted_one_of_the_same_number(tmp_path: Path) -> None:
    brokers, keys = [FaultyBroker(tmp_path, name) for name in ("node1", "node2")], stranger(tmp_path)
    base = document_of(brokers, newcomer(keys, "bad"))
    owners = {cid: StateDirectory(broker.state_dir).keys() for cid, broker in enumerate(brokers, 1)} | {BAD: keys}
    votes = [base.ballot(2, 2).sign(cid, owners[cid].sign_private) for cid in (1, 2)]
    new = new_epoch(base.document, 2, epoch=2, fork=None, when=0, reason="", votes=votes)
    voted = sign(new, 2, owners[2].sign_private, after=base)
    forged = new_epoch(base.document, BAD, epoch=2, fork=None, when=0, reason="", forced=True)
    forced = sign(forged, BAD, keys.sign_private, after=base)
    try:
        for broker in brokers:
            StateDirectory(broker.state_dir).store_document(voted)
            broker.start()
        eventually(lambda: all(answers_status(broker) for broker in brokers))
        for broker in brokers:
            with connected(zmq.DEALER, keys, broker.member().curve_key, broker.ports[1]) as control:
                control.send_multipart([pack({"op": "offer"}), forced.pack()])
                assert ask(control, {"op": "ping", "id": 1})["op"] == "pong"
            assert held(broker).document.master == 2
            assert held(broker).document.history == voted.document.history
    finally:
        for broker in brokers:
            broker.close()


# -- another cluster --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["a stranger here", "a member of both"])
def test_a_node_of_another_cluster_brings_nothing_in(tmp_path: Path, known: bool) -> None:
    """Its document names a node of this cluster as a member; at worst, this cluster's names it, too."""
    here, there = FaultyBroker(tmp_path, "node1"), FaultyBroker(tmp_path, "other")
    ours = document_of([here], *([there.member()] if known else []))
    foreign = with_member(first_document(b"another cluster!", "other", "mirror", there.member()), here.member())
    theirs = sign(replace(foreign, serial=100), 1, StateDirectory(there.state_dir).keys().sign_private)
    try:
        for broker, document in ((here, ours), (there, theirs)):
            StateDirectory(broker.state_dir).store_document(document)
            broker.start()
        eventually(lambda: answers_status(here) and answers_status(there))
        with unharmed(here), unharmed(there):
            if known:
                eventually(lambda: "another node or cluster" in str(here.status()[2]["error"]), within_s=10)
                eventually(lambda: "another node or cluster" in str(there.status()[2]["error"]), within_s=10)
            else:
                eventually(lambda: ("events", NO_MEMBER) in here.refused(), within_s=10)
                eventually(lambda: "refuses this node's key" in str(there.status()[2]["error"]), within_s=10)
    finally:
        here.close()
        there.close()


# -- structures as deep as the stack ----------------------------------------------------------------------------------

OPS = ("ping", "replay", "ack", "vote", "call", "credit", "lease", "member.update", "join.progress")
DEPTHS = [1010, 1000, 1023, 995, 990, 985, 980, 970, 960, 940, 900, 500, 17, 5000, 60_000]
"""Those first that Python reads and cannot show: after some tokens that are wrong the door looks at no more."""


def nested(depth: int, key: str, **other: Any) -> bytes:
    """Return a map with a value that is nested so deep; msgpack itself refuses to write it."""
    begin: bytes = bytes([0x81 + len(other)]) + msgpack.packb(other)[1:] + msgpack.packb(key)
    return begin + b"\x91" * depth + b"\xc0"


def throw(peer: Socket, parts: list[bytes]) -> None:
    peer.sndtimeo = 10_000
    peer.send_multipart(parts)
    while peer.poll(0):
        peer.recv_multipart()


def test_what_a_stranger_nests_is_refused(one: FaultyBroker, tmp_path: Path) -> None:
    keys = stranger(tmp_path)
    with unharmed(one):
        for server_key, port, ops in (
            (one.member().curve_key, one.ports[2], ("check", "admit")),
            (KNOWN_PUBLIC, one.key_port, ("key",)),
        ):
            with connected(zmq.DEALER, keys, server_key, port) as peer:
                for depth in DEPTHS:
                    for op in ops:
                        for field in ("id", "token", "password", "name", "version", "op"):
                            throw(peer, [nested(depth, field, **({} if field == "op" else {"op": op}))])


def test_what_a_member_nests_is_refused(tmp_path: Path) -> None:
    one, fake = FaultyBroker(tmp_path, "node1"), FakeMember(tmp_path, "node2", 2, origin=2)
    signed = document_of([one], fake.member())
    fake.start([one.member()])
    try:
        StateDirectory(one.state_dir).store_document(signed)
        one.start()
        eventually(lambda: answers_status(one))
        eventually(lambda: one.status()[2]["heartbeat_age_s"] is not None, what="the member is heard")
        with unharmed(one), connected(zmq.DEALER, fake.keys, one.member().curve_key, one.ports[1]) as control:
            for depth in DEPTHS:
                for op in OPS:
                    for field in ("id", "origin", "position", "applied", "ballot", "method", "args", "host_keys"):
                        throw(control, [nested(depth, field, op=op, **({} if field == "id" else {"id": 1}))])
                throw(control, [pack({"op": "offer"}), nested(depth, "x")])
                for topic in (b"h", b"d", b"t"):
                    fake.event(topic, nested(depth, "alerts", v=1))
                    fake.event(topic, b"\x93" + b"\x91" * depth + b"\xc0\xc0\xc0")
            eventually(lambda: one.status()[2]["heartbeat_age_s"] < 3, what="it is heard as before")
    finally:
        fake.close()
        one.close()
