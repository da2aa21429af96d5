"""`pmgcm create` on a real server: what it checks, and that nothing is left half made."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from broker.cluster.state_directory import StateDirectory
from cli.demo.embedded import EmbeddedPostgres
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.provision import deprovision
from tests.harness.command_line import Node, refused


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
        told = []
        for line in process.stderr:
            told.append(line)
            if str(open_transaction.info.backend_pid) in line:
                break
        assert "waiting for the transaction" in "".join(told[-1:]), (process.poll(), told)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        assert "interrupted" in said
        assert "Traceback" not in said
    untouched(node, dsn)


@pytest.mark.cluster
def test_a_server_that_is_away_is_told(node: Node) -> None:
    refused(node.pmgcm("create"), "the database does not accept a session", "hint:")
