"""The PostgreSQL servers that both systems share, one to publish and others to subscribe; what their tables hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812

from cli.demo.embedded import EmbeddedPostgres

POLL_S = 0.002
VISIBLE_S = 900.0
"""Longer than any line takes; what is not there by then never comes."""
SETTINGS = {
    "shared_buffers": "256MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "checkpoint_completion_target": "0.9",
    "autovacuum": "off",
    "max_connections": "300",
    "max_wal_senders": "40",
    "max_replication_slots": "60",
    "max_logical_replication_workers": "30",
    "max_sync_workers_per_subscription": "2",
    "max_worker_processes": "50",
    "wal_retrieve_retry_interval": "100ms",
}
"""Of all servers. No checkpoint and no vacuum falls into one system's turn and not into the other's."""


def connect(dsn: str, **extra: Any) -> Connection:
    """Open a session that commits each statement."""
    connection: Connection = psycopg2.connect(dsn, **extra)
    connection.autocommit = True
    return connection


def ask(dsn: str, statement: str, parameters: Sequence[object] | None = None) -> list[Any]:
    """Run one statement and return its rows, if any."""
    with contextlib.closing(connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


class Servers:
    """All servers; `with` starts them and removes them again.

    Args:
        fsync: whether they write as a server in production does; without it the disk counts for nothing.
        subscribers: how many servers subscribe.
    """

    def __init__(self, *, fsync: bool, subscribers: int = 1) -> None:
        switch = "on" if fsync else "off"
        settings = SETTINGS | {"fsync": switch, "full_page_writes": switch}
        self.publisher = EmbeddedPostgres(settings=settings, port=5433)
        self.subscribers = [EmbeddedPostgres(settings=settings, port=5434 + n) for n in range(subscribers)]
        self._stack = ExitStack()

    def __enter__(self) -> Servers:
        with ExitStack() as stack:
            stack.enter_context(self.publisher)
            for server in self.subscribers:
                stack.enter_context(server)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def version(self) -> str:
        return str(ask(self.publisher.dsn(), "SHOW server_version")[0][0]).split()[0]

    def create_database(self, server: EmbeddedPostgres, name: str) -> str:
        """Make an empty database and return its connection string."""
        ask(server.dsn(), f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
        return server.dsn(name)

    def roles(self) -> Iterator[tuple[str, EmbeddedPostgres]]:
        """Yield what each server is, and the server."""
        yield "master", self.publisher
        for server in self.subscribers:
            yield "slave", server

    def rest(self) -> None:
        """Write out what is dirty, so that one turn does not pay for the one before."""
        for server in (self.publisher, *self.subscribers):
            ask(server.dsn(), "CHECKPOINT")


def wal_lsn(dsn: str) -> str:
    """Return where a server's WAL ends."""
    return str(ask(dsn, "SELECT pg_current_wal_lsn()")[0][0])


@contextlib.contextmanager
def watching(dsn: str, statement: str) -> Iterator[Any]:
    """Give a function that says whether the statement finds a row."""
    with contextlib.closing(connect(dsn)) as connection, connection.cursor() as cursor:

        def found(parameter: object) -> bool:
            cursor.execute(statement, (parameter,))
            return cursor.fetchone() is not None

        yield found


def await_mark(dsns: Sequence[str], mark: int, *, within_s: float = VISIBLE_S) -> float:
    """Wait until the mark can be read in all databases; returns when (monotonic).

    Raises:
        TimeoutError: when it does not come.
    """
    deadline = time.monotonic() + within_s
    with ExitStack() as stack:
        waiting = [stack.enter_context(watching(dsn, "SELECT 1 FROM mark WHERE id = %s")) for dsn in dsns]
        while True:
            waiting = [found for found in waiting if not found(mark)]
            now = time.monotonic()
            if not waiting:
                return now
            if now > deadline:
                raise TimeoutError(f"the mark {mark} is not on {len(waiting)} of {len(dsns)} after {within_s:.0f} s")
            time.sleep(POLL_S)


def content(dsn: str) -> dict[str, tuple[int, str]]:
    """Return of each table its number of rows and the sum of the hashes of its rows' texts."""
    found = {}
    tables = ask(
        dsn, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1"
    )
    for (table,) in tables:
        query = f'SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM "{table}" AS t'
        found[table] = tuple(ask(dsn, query)[0])
    return found


def compare(publisher: str, subscribers: Sequence[str]) -> int:
    """Compare all tables' content and return how many rows are the same.

    Raises:
        AssertionError: when a table differs.
    """
    expected = content(publisher)
    for dsn in subscribers:
        here = content(dsn)
        for table, (rows, total) in expected.items():
            assert here.get(table) == (rows, total), f"{table} differs: {rows} rows, there {here.get(table)}"
    return sum(rows for rows, _ in expected.values())
