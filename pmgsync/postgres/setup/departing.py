"""What this node's database does when the chain of a node that was removed is over: it forgets all but that.

Rows stay. The row in pmgsync.position stays too, with incarnation 0, and says that the chain is over: a member that was
away may ask, and a copy of this database has what the chain brought.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import psycopg2
import psycopg2.errors
import psycopg2.extensions

from pmgsync.core.positions import format_lsn
from pmgsync.core.profile import Policy, Profile
from pmgsync.errors import UnreachableError
from pmgsync.postgres.catalog import list_tables, synchronised
from pmgsync.postgres.names import SLOT, origin_name
from pmgsync.postgres.session import connect, rows
from pmgsync.postgres.wal.slot_reader import emit_barrier

log = logging.getLogger(__name__)

OVER = 0
"""The incarnation of a chain that is over, in pmgsync.position."""
PATIENCE_S = 20.0
POLL_S = 0.1
_TABLES = ("stale_table", "relation", "schema_failure", "conflict", "repair")
_APPLICATION = "pmgsync departing"

TableName = tuple[bytes, bytes]


def replaced_tables(dsn: str, profile: Profile, *, mirrored: bool) -> list[TableName]:
    """Return the tables that may have rows of other nodes than the master.

    Args:
        mirrored: the node has been master: those that only the master writes, too.

    Raises:
        UnreachableError: when the server does not answer.
    """
    wanted = {Policy.OWNED, Policy.MERGE} | ({Policy.MIRROR} if mirrored else set())
    with _session(dsn) as connection:
        tables = synchronised(list_tables(connection), profile)
    return [(table.schema, table.name) for table, rule in tables if rule.policy in wanted]


def left_out(dsn: str, origin: int) -> list[TableName]:
    """Return the tables of which changes on a chain were left out here.

    Raises:
        UnreachableError: when the server does not answer.
    """
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT schema, name FROM pmgsync.stale_table WHERE origin = %s AND kind <> 'none'", (origin,))
        return [(schema or b"", name or b"") for schema, name in rows(cursor)]


def forget_chain(dsn: str, origin: int) -> None:
    """Note that a chain is over, and forget the rest. No session applies it any more.

    Raises:
        UnreachableError: when the server does not answer, or capture has not come far enough; to be tried again.
    """
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN")
        for table in _TABLES:
            cursor.execute(f"DELETE FROM pmgsync.{table} WHERE origin = %s", (origin,))
        cursor.execute(
            "INSERT INTO pmgsync.position (origin, incarnation, lsn) VALUES (%s, %s, '0/0') "
            "ON CONFLICT (origin) DO UPDATE SET incarnation = EXCLUDED.incarnation, commit_time = NULL",
            (origin, OVER),
        )
        cursor.execute("COMMIT")
    _drop_origin(dsn, origin_name(origin))


def _drop_origin(dsn: str, name: str) -> None:
    """Remove the replication origin of a chain: a server has room for few.

    Not before capture has read what was applied under it: until PostgreSQL 16 the name alone tells capture that this
    was written elsewhere.
    """
    deadline = time.monotonic() + PATIENCE_S
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.pg_replication_origin_oid(%s) IS NULL", (name,))
        if rows(cursor) == [(b"t",)]:
            return
        barrier = format_lsn(emit_barrier(dsn))
        while True:
            cursor.execute(
                "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = %s "
                "AND database = pg_catalog.current_database()",
                (barrier, SLOT),
            )
            if rows(cursor) in ([], [(b"t",)]):
                with contextlib.suppress(psycopg2.errors.ObjectInUse, psycopg2.errors.UndefinedObject):
                    cursor.execute("SELECT pg_catalog.pg_replication_origin_drop(%s)", (name,))
                    return
            if time.monotonic() > deadline:
                raise UnreachableError(f"the replication origin {name} cannot be removed yet")
            time.sleep(POLL_S)


@contextlib.contextmanager
def _session(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    try:
        with contextlib.closing(connect(dsn, application_name=_APPLICATION)) as connection:
            connection.autocommit = True
            yield connection
    except psycopg2.Error as error:
        raise UnreachableError(f"the database did not forget a chain ({str(error).strip()})") from error
