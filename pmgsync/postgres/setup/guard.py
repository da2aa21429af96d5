"""The guard: where this node may not write, tables that the master writes refuse everybody but pmgsync.

That is on every node that is not the master, and on a master that is fenced while its lease (`lease`) does not hold.
There the triggers stand too, so that closing waits for no lock. sql/guard.sql has the triggers. Guarding and opening
are done table by table, with locks that are waited for only an
instant: nobody queues up behind them, and what is in use now is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import psycopg2
import psycopg2.errors
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.membership import Member
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.session import connect, quote_ident, quote_literal
from pmgsync.postgres.setup.watch import GUARD_TRIGGER, arm, disarm, install

log = logging.getLogger(__name__)

LOCK_MS = 100
"""Milliseconds that a table's lock is waited for."""
PATIENCE_S = 30.0
PAUSE_S = 0.2


def ensure_guard(
    dsn: str, profile: Profile, *, master: Member | None, fenced: bool = False, patience_s: float = PATIENCE_S
) -> None:
    """Guard this node's database against writes to what the master writes, or open it.

    Args:
        master: of the cluster; None when it is this node and not fenced: nothing is refused then from this function's
            first commit on, and what is left of the triggers is removed.
        fenced: the master is this node, and writes while its lease holds.
        patience_s: seconds in which it is tried again while tables are in use.

    Raises:
        UnreachableError: when the server does not answer, or tables stay in use. What could be done is done.
    """
    deadline = time.monotonic() + patience_s
    with contextlib.closing(connect(dsn, application_name="pmgsync guard")) as connection:
        connection.autocommit = True
        while True:
            try:
                pending = keep_guard(connection, profile, master=master, fenced=fenced)
            except psycopg2.Error as error:
                kind = UnreachableError if isinstance(error, psycopg2.OperationalError) else PmgsyncError
                raise kind(f"the database could not be guarded ({str(error).strip()})") from error
            if not pending:
                return
            if time.monotonic() > deadline:
                raise in_use(pending)
            time.sleep(PAUSE_S)


def in_use(pending: list[str]) -> UnreachableError:
    """Return the error for tables whose triggers cannot be made or removed yet."""
    shown = ", ".join(pending[:5]) + (f" and {len(pending) - 5} more" if len(pending) > 5 else "")
    return UnreachableError(
        f"tables are in use and cannot be guarded against local writes, or opened, yet: {shown}",
        hint="it is tried again; end transactions that hold them for long",
    )


def keep_guard(connection: Connection, profile: Profile, *, master: Member | None, fenced: bool = False) -> list[str]:
    """Do what can be done at once; return the tables that are in use. A second time costs one query.

    Args:
        connection: in autocommit mode.

    Raises:
        psycopg2.Error: when the server does not answer or refuses.
    """
    if not _installed(connection):
        with _transaction(connection):
            install(connection, profile)
            arm(connection)
    if master is None:
        _open(connection)
        return _each(connection, _GUARDED, _drop)
    _close(connection, master, fenced)
    # What is not the master's any more (renamed, another policy) is opened again.
    return _each(connection, _UNGUARDED, _create) + _each(connection, _SUPERFLUOUS, _drop)


def unguarded(connection: Connection) -> list[str]:
    """Return the tables that this node could write and should not, if it is no master."""
    with connection.cursor() as cursor:
        cursor.execute(_UNGUARDED)
        return [f"{as_text(schema)}.{as_text(name)}" for schema, name in cursor.fetchall()]


def old_snapshots(connection: Connection) -> int:
    """Return how many transactions have a snapshot that may be older than the guard's row.

    One in REPEATABLE READ that does not see the row is not refused, and its commit is not checked.
    """
    with connection.cursor() as cursor:
        cursor.execute(_OLD_SNAPSHOTS)
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def guarded_by(connection: Connection) -> str | None:
    """Return the master's name that a refused write is told, None when this node is the master."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.to_regclass('pmgsync.guard') IS NOT NULL")
        if cursor.fetchone() != (True,):
            return None
        cursor.execute("SELECT master FROM pmgsync.guard WHERE NOT fenced")
        row = cursor.fetchone()
    return None if row is None else as_text(row[0])


_OLD_SNAPSHOTS = """
SELECT count(*) FROM pg_catalog.pg_stat_activity AS a, pmgsync.guard AS g
WHERE a.backend_type = 'client backend' AND a.datname = pg_catalog.current_database()
  AND a.application_name NOT LIKE 'pmgsync %'
  AND pg_catalog.age(a.backend_xmin) >= pg_catalog.age(g.xmin)
"""
_UNGUARDED = """
SELECT g.schema, g.name FROM pmgsync.guardable AS g
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid = g.relation
                  AND t.tgname = 'pmgsync_guard' AND t.tgenabled = 'O')
ORDER BY 1, 2
"""
_GUARDED = """
SELECT n.nspname, c.relname
FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE t.tgname = 'pmgsync_guard' AND NOT t.tgisinternal
"""
_SUPERFLUOUS = _GUARDED + "AND c.oid NOT IN (SELECT g.relation FROM pmgsync.guardable AS g)"


def _installed(connection: Connection) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.to_regclass('pmgsync.reign') IS NOT NULL")
        return cursor.fetchone() == (True,)


def _open(connection: Connection) -> None:
    """Refuse nothing any more, at once; new tables are not guarded."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM pmgsync.guard")
        if cursor.rowcount:
            log.info("action=guard-opened")
    disarm(connection, GUARD_TRIGGER)


def _close(connection: Connection, master: Member, fenced: bool) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT master, address, fenced FROM pmgsync.guard")
        rows = [(as_text(name), as_text(address), lease) for name, address, lease in cursor.fetchall()]
        if rows != [(master.name, master.address, fenced)]:
            if not fenced:
                # Before the row, and seen by every transaction, whatever its snapshot: one that is open cannot commit.
                cursor.execute("SELECT pmgsync.set_lease(NULL)")
            cursor.execute(
                "INSERT INTO pmgsync.guard (master, address, fenced) VALUES (%s, %s, %s) ON CONFLICT (one) DO UPDATE "
                "SET (master, address, fenced) = (EXCLUDED.master, EXCLUDED.address, EXCLUDED.fenced)",
                (master.name, master.address, fenced),
            )
            log.info("action=guard-closed master=%s fenced=%s", master.name, fenced)
        cursor.execute("SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = %s", (GUARD_TRIGGER,))
        if cursor.rowcount == 0:
            with _transaction(connection) as making:
                making.execute(
                    f"CREATE EVENT TRIGGER {GUARD_TRIGGER} ON ddl_command_end WHEN TAG IN ('CREATE TABLE', "
                    "'CREATE TABLE AS', 'SELECT INTO', 'ALTER TABLE') EXECUTE FUNCTION pmgsync.guard_new()"
                )
                making.execute(f"ALTER EVENT TRIGGER {GUARD_TRIGGER} ENABLE ALWAYS")


def _each(connection: Connection, query: str, statement: Callable[[bytes, bytes], bytes]) -> list[str]:
    """Do something to each table that a query finds; return those that are in use."""
    pending = []
    try:
        # Looking into a partitioned table waits for whoever has locked it whole, too.
        with _transaction(connection) as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
            cursor.execute(query)
            found = cursor.fetchall()
    except psycopg2.errors.LockNotAvailable:
        return ["one that is locked as a whole"]
    for schema, name in found:
        try:
            with _transaction(connection) as inner:
                inner.execute(f"SET LOCAL lock_timeout = {LOCK_MS}")
                inner.execute(statement(schema, name))
        except (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected):
            pending.append(f"{as_text(schema)}.{as_text(name)}")
        except (psycopg2.errors.UndefinedTable, psycopg2.errors.DuplicateObject, psycopg2.errors.UndefinedObject):
            continue  # dropped or done by somebody else meanwhile
    return pending


def _create(schema: bytes, name: bytes) -> bytes:
    # One that somebody has disabled is made anew.
    return b"DROP TRIGGER IF EXISTS pmgsync_guard ON %s.%s; SELECT pmgsync.guard_table(%s, %s)" % (
        quote_ident(schema), quote_ident(name), quote_literal(schema), quote_literal(name),
    )  # fmt: skip


def _drop(schema: bytes, name: bytes) -> bytes:
    return b"DROP TRIGGER pmgsync_guard ON %s.%s" % (quote_ident(schema), quote_ident(name))


@contextlib.contextmanager
def _transaction(connection: Connection) -> Iterator[Cursor]:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except psycopg2.Error:
            if not connection.closed:
                cursor.execute("ROLLBACK")
            raise
