"""What a slot's reader tells the server: never more than it was asked to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.positions import parse_lsn
from pmgsync.postgres.session import connect
from pmgsync.postgres.wal.slot_reader import SlotReader
from tests.harness.cluster import eventually
from tests.harness.database import Database

pytestmark = pytest.mark.cluster


@pytest.fixture
def database(server: EmbeddedPostgres) -> Database:
    return Database(server)


@pytest.fixture
def sql(database: Database) -> Iterator[Callable[[str], Any]]:
    """Run a statement; a published table, another one, and a slot are there."""
    with contextlib.closing(connect(database.dsn, application_name="test")) as connection:
        connection.autocommit = True

        def run(statement: str) -> Any:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                row = cursor.fetchone() if cursor.description else None
                value = row[0] if row else None
                return value.decode() if isinstance(value, bytes) else value

        run("SET search_path = public")
        run("CREATE TABLE t (id int)")
        run("CREATE TABLE other (v text)")
        run("CREATE PUBLICATION p FOR TABLE t")
        run("SELECT pg_create_logical_replication_slot('s', 'pgoutput')::text")
        yield run


def read_commit(reader: SlotReader) -> int:
    """Read one transaction and return where it ends."""
    seen: list[bytes] = []

    def commit() -> bool:
        for message in reader.messages():
            seen.append(message)
            if message[:1] == b"C":
                return True
        return False

    eventually(commit, within_s=20)
    return int.from_bytes(seen[-1][10:18], "big")


def test_a_keepalive_before_a_message_is_not_confirmed_with_it(database: Database, sql: Callable[[str], Any]) -> None:
    """psycopg2 takes the LSN of a keepalive for confirmed, and would say so with whatever is confirmed next."""

    def confirmed() -> int:
        return parse_lsn(sql("SELECT confirmed_flush_lsn::text FROM pg_replication_slots"))

    reader = SlotReader(database.dsn, slot="s", publication="p", start_lsn=0)
    with contextlib.closing(reader):
        for _ in range(5):
            sql("INSERT INTO t VALUES (1)")
            safe = read_commit(reader)
            reader.confirm(safe)
            sql("INSERT INTO other VALUES (repeat('x', 1000))")

            def told(safe: int = safe) -> bool:
                assert not list(reader.messages())
                return reader.caught_up_lsn > safe

            eventually(told, within_s=20, what="a keepalive beyond what was confirmed")
            sql("INSERT INTO t VALUES (2)")
            end = read_commit(reader)
            for _ in range(5):
                reader.confirm(safe, ask=True)
                time.sleep(0.05)
                assert confirmed() <= safe
            reader.confirm(end)
            eventually(lambda end=end: confirmed() >= end, within_s=20, what="what is safe is confirmed")  # type: ignore[misc]
