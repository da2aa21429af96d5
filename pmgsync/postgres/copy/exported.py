"""Exported snapshots: a state of the database that belongs to a known position on the node's own chain."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Collection, Generator, Iterator

import psycopg2
import psycopg2.extensions
from psycopg2.extras import LogicalReplicationConnection

from pmgsync.core.positions import parse_lsn
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.catalog import Table, as_text, list_tables
from pmgsync.postgres.session import PINNED, connect
from pmgsync.postgres.wal.slot import waited_for

Connection = psycopg2.extensions.connection
POLL_S = 0.2
WAIT_NOTICE_S = 1.0


class SnapshotChangedError(PmgsyncError):
    """A table was truncated, rewritten or altered between the snapshot and its reading; a new one may do."""

    recoverable = True


def open_snapshot_session(dsn: str, name: str | None) -> Connection:
    """Open a session in a read-only transaction on an exported snapshot, or on one of its own.

    Raises:
        UnreachableError: when the server does not let it in.
    """
    connection = connect(dsn, application_name="pmgsync snapshot")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            # A default of role or database must not end what takes long; the setting is not known before 17.
            if connection.server_version >= 170000:
                cursor.execute("SET transaction_timeout = 0")
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if name is not None:
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{name}'")
            cursor.execute("SELECT 1")
    except BaseException:
        connection.close()
        raise
    return connection


class ExportedSnapshot:
    """A temporary slot and the snapshot that it exported; both end with `close`.

    Attributes:
        lsn: every transaction that committed at or below this LSN is in the snapshot, no other is.
        name: for SET TRANSACTION SNAPSHOT.
    """

    def __init__(self, connection: Connection, name: str, lsn: int) -> None:
        self._connection = connection
        self.name = name
        self.lsn = lsn

    def close(self) -> None:
        """Release it; sessions that use it already may go on."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()


def export_snapshot(dsn: str) -> Generator[str, None, ExportedSnapshot]:
    """Return, as the generator's value, a new snapshot; yields, in words, what is waited for.

    Creating the slot waits for every open writing or prepared transaction. It works in a thread, so that the
    generator can be closed meanwhile, which leaves nothing behind: the slot is temporary.

    Raises:
        UnreachableError: when the server does not create it.
    """
    options = " ".join(f"-c {name}={value}" for name, value in PINNED.items() if name != "client_encoding")
    options += " -c idle_session_timeout=0 -c client_connection_check_interval=1s"
    parameters = psycopg2.extensions.parse_dsn(dsn)
    parameters["options"] = options
    parameters |= {"client_encoding": PINNED["client_encoding"], "application_name": "pmgsync snapshot"}
    watching = connect(dsn, application_name="pmgsync snapshot")
    replicating: Connection | None = None
    # Not Thread.join: when a signal's exception ends it, the thread counts as ended although it runs.
    over = threading.Event()
    started = False
    outcome: list[tuple[str, str] | Exception] = []
    done = False
    try:
        watching.autocommit = True
        replicating = psycopg2.connect(**parameters, connection_factory=LogicalReplicationConnection)
        cursor = replicating.cursor()
        slot = f"pmgsync_snapshot_{secrets.token_hex(8)}"

        def create() -> None:
            try:
                cursor.execute(f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')")
                row = cursor.fetchone()
                assert row is not None
                outcome.append((as_text(row[1]), as_text(row[2])))
            except Exception as error:
                outcome.append(error)
            finally:
                over.set()

        started = True
        threading.Thread(target=create, name="export-snapshot", daemon=True).start()
        noticed = time.monotonic()
        while not over.wait(POLL_S):
            if time.monotonic() - noticed > WAIT_NOTICE_S:
                noticed = time.monotonic()
                yield ", ".join(waited_for(watching, replicating.info.backend_pid))
        result = outcome[0]
        if isinstance(result, Exception):
            raise result
        done = True
        # A commit record may stand at the consistent point itself, and is not in.
        return ExportedSnapshot(replicating, result[1], parse_lsn(result[0]) - 1)
    except psycopg2.Error as error:
        raise UnreachableError(f"a snapshot could not be begun ({str(error).strip()})") from error
    finally:
        watching.close()
        if replicating is not None and not done:
            while started and not over.is_set():
                replicating.cancel()
                over.wait(POLL_S)
            replicating.close()


def estimated_size(connection: Connection, tables: Collection[Table]) -> dict[str, int]:
    """Return how much these tables have, as `rows` (as far as PostgreSQL has counted them) and `bytes`.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint, coalesce(sum(pg_table_size(oid)), 0)::bigint "
            "FROM pg_class WHERE oid = ANY(%s::oid[])",
            ([table.oid for table in tables],),
        )
        row = cursor.fetchone()
        assert row is not None
    return {"rows": int(row[0]), "bytes": int(row[1])}


def hold_tables(connection: Connection, dsn: str, tables: list[Table]) -> Iterator[str]:
    """Lock tables against being truncated or altered, and check that none was since the snapshot.

    A table that was truncated or rewritten after the snapshot would look empty or wrong in it. Yields while it waits.

    Args:
        connection: the session on the snapshot; it keeps the locks to its transaction's end.

    Raises:
        SnapshotChangedError: when one was.
    """
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '1s'")
        for table in tables:
            while True:
                cursor.execute("SAVEPOINT held")
                try:
                    cursor.execute(b"LOCK TABLE ONLY %s IN ACCESS SHARE MODE" % table.quoted)
                except psycopg2.errors.LockNotAvailable:
                    cursor.execute("ROLLBACK TO SAVEPOINT held")
                    yield f"a lock on {table.label}"
                except (psycopg2.errors.UndefinedTable, psycopg2.errors.InvalidSchemaName) as error:
                    raise SnapshotChangedError(f"the table {table.label} was dropped or renamed") from error
                else:
                    cursor.execute("RELEASE SAVEPOINT held")
                    break
        cursor.execute("SET LOCAL lock_timeout = 0")
    now = connect(dsn, application_name="pmgsync snapshot")
    try:
        now.autocommit = True
        shapes = {table.shape for table in list_tables(now)}
    finally:
        now.close()
    for table in tables:
        if table.shape not in shapes:
            raise SnapshotChangedError(
                f"the table {table.label} was truncated or altered while it was to be read",
                hint="try again when nobody changes tables",
            )
