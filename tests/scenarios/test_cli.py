"""`pmgcm` as a person meets it: sentences, exit codes, and a node that is as it was after every refusal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.cluster.door_client import DoorClient
from broker.cluster.state_directory import StateDirectory
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.zap import DOOR_DOMAIN
from cli.demo.embedded import EmbeddedPostgres
from cli.demo.hold import free_ports
from pmgsync.core.membership import Member, first_document, sign, with_member, without_member
from pmgsync.errors import MembershipError, UnreachableError
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.provision import deprovision

FINGERPRINT = ":".join(["AB"] * 32)


@dataclass
class Node:
    """A node's configuration on disk, without a database or services."""

    directory: Path
    config: Path
    ports: list[int]

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def pmgcm(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run pmgcm for this node."""
        return pmgcm("--config", str(self.config), *arguments, **environment)


def pmgcm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pmgcm, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """Return a node whose database does not exist."""
    made = Node(tmp_path, tmp_path / "node.toml", free_ports(3))
    events, control, join = made.ports
    made.config.write_text(
        f'[node]\nname = "pmg1"\naddress = "127.0.0.1"\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n'
        f'[ports]\nevents = {events}\ncontrol = {control}\njoin = {join}\n[postgres]\ndsn = "host={tmp_path} port=1"\n'
    )
    return made


def refused(done: subprocess.CompletedProcess[str], *expected: str, code: int = 1) -> None:
    """Check that a command failed with a sentence that has these parts, and no traceback."""
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr


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
    for name in ("create", "join-cmd", "join", "status", "wait", "delete", "demo"):
        assert f" {name} " in done.stdout


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    refused(pmgcm("--config", str(tmp_path / "none.toml"), "status"), "error:", "none.toml", "hint:")


def test_a_malformed_configuration_names_file_key_and_expectation(node: Node) -> None:
    node.config.write_text('[ports]\nevents = "many"\n')
    refused(node.pmgcm("status"), str(node.config), "events", "expected a port number")


def test_the_configuration_can_come_from_the_environment(node: Node) -> None:
    refused(pmgcm("status", PMGCM_CONFIG=str(node.config)), "no cluster defined")


@pytest.mark.parametrize("command", [("status",), ("wait",), ("join-cmd",), ("delete", "2", "--yes")])
def test_without_a_cluster_commands_say_so(node: Node, command: tuple[str, ...]) -> None:
    refused(node.pmgcm(*command), "error: no cluster defined", "hint:")
    assert not node.state.exists() or not (node.state / "cluster.document").exists()


@pytest.mark.parametrize("command", [("status",), ("wait", "--timeout", "1"), ("join-cmd",)])
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


def test_join_explains_where_the_fingerprint_comes_from(node: Node) -> None:
    refused(node.pmgcm("join", "127.0.0.1"), "fingerprint is missing", "pmgcm join-cmd")


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
    sockets.serve(socket, server.curve_secret, DOOR_DOMAIN, "127.0.0.1", port, "join")
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
        (_garbage, ((MembershipError, UnreachableError), "fingerprint does not match|does not answer")),
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


# -- create, on a real server ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """Yield a server that has what a cluster needs; each test has a database of its own."""
    with EmbeddedPostgres(initdb_args=["--encoding=SQL_ASCII", "--locale=C"]) as running:
        yield running


def on_database(node: Node, server: EmbeddedPostgres, name: str, *, schema: bool = True) -> str:
    """Make a database for a node, point its configuration there, and return the connection string."""
    execute(server.dsn(), f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    dsn = server.dsn(name)
    if schema:
        execute(dsn, (resources.files("cli.demo") / "pmg_schema.sql").read_text())
    lines = node.config.read_text().splitlines()
    node.config.write_text("\n".join([*lines[:-1], f"dsn = {json.dumps(dsn)}", ""]))
    return dsn


def execute(dsn: str, statement: str) -> None:
    with contextlib.closing(connect(dsn, application_name="test")) as connection:
        connection.autocommit = True
        connection.cursor().execute(statement)


def query(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(connect(dsn, application_name="test")) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall()


TRACES = (
    "SELECT (SELECT count(*) FROM pg_namespace WHERE nspname = 'pmgsync'), (SELECT count(*) FROM pg_publication), "
    "(SELECT count(*) FROM pg_replication_slots WHERE database = current_database()), "
    "(SELECT count(*) FROM pg_class WHERE relreplident = 'f')"
)


def untouched(node: Node, dsn: str) -> None:
    """Check that neither the database nor the state directory has anything of a cluster."""
    assert query(dsn, TRACES) == [(0, 0, 0, 0)]
    assert not (node.state / "cluster.document").exists()
    assert not (node.state / "create.begun").exists()


@pytest.mark.cluster
def test_create_makes_a_cluster_of_one(node: Node, server: EmbeddedPostgres) -> None:
    dsn = on_database(node, server, "made")
    execute(dsn, "INSERT INTO public.localstat (time, cid, mtime) VALUES (1, 0, 1)")
    done = node.pmgcm("create", "--name", "mail")
    assert done.returncode == 0, done
    assert "cluster 'mail' was created" in done.stdout
    assert query(dsn, "SELECT cid FROM public.localstat") == [(1,)]
    signed = StateDirectory(node.state).document()
    assert signed is not None
    signed.verify(signed.document)
    (member,) = signed.document.members
    assert (signed.document.name, signed.document.profile, signed.document.epoch) == ("mail", "pmg", 1)
    assert (member.cid, member.name, member.role, member.join) == (1, "pmg1", "master", node.ports[2])
    document = (node.state / "cluster.document").read_bytes()
    refused(node.pmgcm("create"), "cluster already defined")
    assert (node.state / "cluster.document").read_bytes() == document
    # The state directory was lost: the database still knows, and is not taken over by another cluster.
    (node.state / "cluster.document").unlink()
    refused(node.pmgcm("create"), "cluster already defined")
    deprovision(dsn)
    untouched(node, dsn)


@pytest.mark.cluster
def test_create_takes_up_after_one_that_was_killed(node: Node, server: EmbeddedPostgres) -> None:
    dsn = on_database(node, server, "killed")
    assert node.pmgcm("create").returncode == 0
    # As it is when kill -9 comes between the database and the document.
    (node.state / "cluster.document").rename(node.state / "create.begun")
    done = node.pmgcm("create")
    assert done.returncode == 0, done
    assert "was interrupted" in done.stderr
    assert not (node.state / "create.begun").exists()
    deprovision(dsn)


@pytest.mark.cluster
def test_create_names_everything_that_must_be_put_right(node: Node, server: EmbeddedPostgres) -> None:
    dsn = on_database(node, server, "lacking")
    execute(dsn, "DROP TABLE public.userprefs")
    with socket.create_server(("127.0.0.1", node.ports[1])):
        refused(
            node.pmgcm("create"),
            "2 things must be put right",
            f"the control port {node.ports[1]} on 127.0.0.1 cannot be bound",
            "[ports] control",
            "userprefs",
        )
    untouched(node, dsn)


@pytest.mark.cluster
def test_create_says_how_to_get_logical_decoding(node: Node) -> None:
    with EmbeddedPostgres(settings={"wal_level": "replica"}) as plain:
        dsn = on_database(node, plain, "plain")
        refused(node.pmgcm("create"), "wal_level is replica", "hint: set wal_level = logical and restart PostgreSQL")
        untouched(node, dsn)


@pytest.mark.cluster
def test_create_refuses_an_address_that_is_not_its_own(node: Node, server: EmbeddedPostgres) -> None:
    dsn = on_database(node, server, "elsewhere")
    node.config.write_text(node.config.read_text().replace('"127.0.0.1"', '"192.0.2.1"'))
    refused(node.pmgcm("create"), "192.0.2.1 is not one of this machine's", "[node] address")
    untouched(node, dsn)


@pytest.mark.cluster
def test_an_interrupted_create_leaves_nothing(node: Node, server: EmbeddedPostgres) -> None:
    dsn = on_database(node, server, "interrupted")
    with contextlib.closing(connect(dsn, application_name="open")) as open_transaction:
        open_transaction.cursor().execute("CREATE TABLE public.held ()")
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "--config", str(node.config), "create"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        # The slot waits for the open transaction, and says so.
        waited = next(line for line in process.stderr if str(open_transaction.info.backend_pid) in line)
        assert "waiting" in waited
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        assert "interrupted" in said
        assert "Traceback" not in said
    untouched(node, dsn)


@pytest.mark.cluster
def test_a_server_that_is_away_is_told(node: Node) -> None:
    refused(node.pmgcm("create"), "the database does not accept a session", "hint:")
