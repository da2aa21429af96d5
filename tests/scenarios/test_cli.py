"""`pmgcm` as a person meets it: sentences, exit codes, and a node that is as it was after every refusal."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from broker.cluster.door_client import DoorClient
from broker.cluster.state_directory import StateDirectory
from broker.net import sockets
from broker.net.keys import NodeKeys
from pmgsync.core.membership import Member, first_document, sign, with_member, without_member
from pmgsync.errors import MembershipError, UnreachableError
from tests.harness.cluster import free_ports
from tests.harness.command_line import Node, pmgcm, refused

FINGERPRINT = ":".join(["AB"] * 32)


def found(node: Node, *, master: bool = True, removed: bool = False) -> None:
    """Put a cluster document into a node's state directory: of a cluster of this node (unless it was removed) and one
    other."""
    state = StateDirectory(node.state)
    keys, other = state.keys(), StateDirectory(node.directory / "other").keys()
    mine, theirs = _member(1, "pmg1", keys, node.ports), _member(2, "pmg2", other, free_ports(3))
    founder, newcomer = (mine, theirs) if master else (theirs, mine)
    document = first_document(b"c" * 16, "test", "pmg", Member.from_map({**founder.to_map(), "cid": 1}))
    document = with_member(document, newcomer)
    if removed:
        document = without_member(document, 2)
    state.store_document(sign(document, 1, (keys if master else other).sign_private))


def _member(cid: int, name: str, keys: NodeKeys, ports: list[int]) -> Member:
    events, control, join = ports
    return Member(cid, name, "127.0.0.1", events, control, join, keys.curve_public, keys.sign_public)


# -- usage and configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("status", "--nonsense"),
        ("delete",),
        ("delete", "one"),
        ("join",),
        ("wait", "--timeout", "soon"),
        ("demo", "--nodes", "0"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    refused(pmgcm(*arguments), "Usage:", code=2)


def test_help_names_every_command() -> None:
    done = pmgcm("--help")
    assert done.returncode == 0
    for name in ("create", "join-cmd", "join", "status", "wait", "delete", "promote", "sync", "update-fingerprints"):
        assert f" {name} " in done.stdout


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    refused(pmgcm("--config", str(tmp_path / "none.toml"), "status"), "error:", "none.toml", "hint:")


def test_a_malformed_configuration_names_file_key_and_expectation(node: Node) -> None:
    node.config.write_text('[ports]\nevents = "many"\n')
    refused(node.pmgcm("status"), str(node.config), "events", "expected a port number")


def test_the_configuration_can_come_from_the_environment(node: Node) -> None:
    refused(pmgcm("status", PMGCM_CONFIG=str(node.config)), "no cluster defined")


@pytest.mark.parametrize(
    "command", [("status",), ("wait",), ("join-cmd",), ("delete", "2", "--yes"), ("update-fingerprints",)]
)
def test_without_a_cluster_commands_say_so(node: Node, command: tuple[str, ...]) -> None:
    refused(node.pmgcm(*command), "error: no cluster defined", "hint:")
    assert not node.state.exists() or not (node.state / "cluster.document").exists()


@pytest.mark.parametrize("command", [("status",), ("wait", "--timeout", "1"), ("join-cmd",), ("update-fingerprints",)])
def test_without_a_broker_commands_say_so(node: Node, command: tuple[str, ...]) -> None:
    found(node)
    refused(node.pmgcm(*command), "pmgsync-broker is not running here", "hint: start it")


def test_debugging_shows_the_traceback(node: Node) -> None:
    done = node.pmgcm("status", PMGCM_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


# -- delete ----------------------------------------------------------------------------------------------------------


def test_the_master_deletes_a_node(node: Node) -> None:
    found(node)
    done = node.pmgcm("delete", "2", "--yes")
    assert done.returncode == 0, done
    assert "pmg2 (2) was removed" in done.stdout
    signed = StateDirectory(node.state).document()
    assert signed is not None
    signed.verify(signed.document)
    assert (signed.document.cids, signed.document.max_cid, signed.document.serial) == (frozenset({1}), 2, 3)


@pytest.mark.parametrize(
    ("master", "cid", "expected"),
    [
        (True, "1", "unable to delete master node"),
        (True, "7", "no member has CID 7"),
        (False, "1", "operation not permitted (not master)"),
    ],
)
def test_a_delete_that_is_refused_changes_nothing(node: Node, master: bool, cid: str, expected: str) -> None:
    found(node, master=master)
    before = (node.state / "cluster.document").read_bytes()
    refused(node.pmgcm("delete", cid, "--yes"), expected)
    assert (node.state / "cluster.document").read_bytes() == before


def test_delete_asks_and_takes_silence_for_no(node: Node) -> None:
    found(node)
    before = (node.state / "cluster.document").read_bytes()
    refused(node.pmgcm("delete", "2"), "no terminal", "--yes")
    assert (node.state / "cluster.document").read_bytes() == before


# -- join ------------------------------------------------------------------------------------------------------------


def test_join_trusts_nobody_unseen(node: Node) -> None:
    refused(node.pmgcm("join", "127.0.0.1", "--yes"), "--fingerprint", "pmgcm join-cmd")
    (port,) = free_ports(1)
    refused(node.pmgcm("join", "127.0.0.1", "--key-port", str(port)), "is unreachable: the connection was refused")


def test_join_refuses_what_is_no_fingerprint(node: Node) -> None:
    refused(node.pmgcm("join", "127.0.0.1", "--fingerprint", "AB:CD"), "is not a fingerprint", "64 hexadecimal")


def test_join_and_create_refuse_a_node_that_is_a_member(node: Node) -> None:
    found(node)
    refused(node.pmgcm("create"), "cluster already defined")
    refused(node.pmgcm("join", "127.0.0.1", "--fingerprint", FINGERPRINT, "--token", "x"), "cluster already defined")


def test_a_node_that_was_removed_may_join_again(node: Node) -> None:
    found(node, master=False, removed=True)
    # It gets as far as the database, which is not there.
    refused(node.pmgcm("join", "127.0.0.1", "--fingerprint", FINGERPRINT, "--token", "x"), "does not accept a session")


# -- the door, as a newcomer meets it --------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> NodeKeys:
    return StateDirectory(tmp_path / "newcomer").keys()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[tuple[int, NodeKeys]]:
    """Yield the port and the keys of a socket that does what a join door does in a handshake."""
    (port,) = free_ports(1)
    server = StateDirectory(tmp_path / "master").keys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sockets.open_socket(context, zmq.ROUTER)
    sockets.serve(socket, server.curve_secret, "127.0.0.1", port, "join")
    yield port, server
    context.destroy(linger=0)


def test_a_right_fingerprint_connects(door: tuple[int, NodeKeys], keys: NodeKeys) -> None:
    port, server = door
    with DoorClient("127.0.0.1", port, server.curve_public, keys):
        pass


def test_a_wrong_fingerprint_is_named(door: tuple[int, NodeKeys], keys: NodeKeys) -> None:
    with pytest.raises(MembershipError, match="fingerprint does not match the key of the node at"):
        DoorClient("127.0.0.1", door[0], keys.curve_public, keys).__enter__()


def test_a_closed_port_is_unreachable(keys: NodeKeys) -> None:
    with pytest.raises(UnreachableError, match="connection was refused"):
        DoorClient("127.0.0.1", free_ports(1)[0], keys.curve_public, keys).__enter__()


def _silent(connection: socket.socket) -> None:
    while connection.recv(1024):
        pass


def _garbage(connection: socket.socket) -> None:
    connection.sendall(b"\xff" * 4096)
    _silent(connection)


@pytest.mark.parametrize(
    ("behave", "expected"),
    [
        (_silent, (UnreachableError, "does not answer")),
        (_garbage, (UnreachableError, "is not a pmgsync master|does not answer")),
    ],
)
def test_something_else_on_the_port_is_told(
    behave: Callable[[socket.socket], None], expected: tuple[type[Exception], str], keys: NodeKeys
) -> None:
    def serve() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    behave(connection)
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(expected[0], match=expected[1]):
            DoorClient("127.0.0.1", listener.getsockname()[1], keys.curve_public, keys).__enter__()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
