"""Creating a slot, and waiting for transactions: reports what it waits for, and a signal ends it at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import psycopg2
import psycopg2.extensions

from pmgsync.postgres.catalog import as_text

POLL_S = 0.1
CANCEL_S = 20.0

Progress = Callable[[str], None]
Connection = psycopg2.extensions.connection


def create_slot(creating: Connection, watching: Connection, slot: str, tell: Progress) -> None:
    """Create a slot, which waits for every open writing or prepared transaction; a signal ends the wait.

    Args:
        creating: a session in autocommit mode; it works in a thread, because a signal does not end a call into libpq.
        watching: another one, which looks at what is waited for.

    Raises:
        psycopg2.Error: when the server does not create it; there is none then.
    """
    outcome: list[psycopg2.Error | None] = []
    # Not Thread.join: when a signal's exception ends it, the thread counts as ended although it runs.
    over = threading.Event()
    with creating.cursor() as cursor:
        # Without it the server would go on waiting, and create the slot, for a process that was killed meanwhile.
        cursor.execute("SET client_connection_check_interval = '1s'")
        pid = creating.info.backend_pid

        def create() -> None:
            try:
                cursor.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
                outcome.append(None)
            except psycopg2.Error as error:
                outcome.append(error)
            finally:
                over.set()

        threading.Thread(target=create, name="create-slot", daemon=True).start()
        told: list[str] = []
        try:
            while not over.wait(POLL_S):
                for text in waited_for(watching, pid):
                    if text not in told:
                        told.append(text)
                        tell(f"waiting for {text} to end")
        except BaseException:
            # Again and again: the first may come before the statement has reached the server.
            deadline = time.monotonic() + CANCEL_S
            while not over.is_set() and time.monotonic() < deadline:
                creating.cancel()
                over.wait(POLL_S)
            raise
    if outcome[0] is not None:
        raise outcome[0]


_WAITED_FOR = """
SELECT x.gid::text, a.pid, a.usename::text, a.application_name::text, date_trunc('second', a.xact_start)::text
FROM pg_locks AS l
LEFT JOIN pg_prepared_xacts AS x ON x.transaction = l.transactionid
LEFT JOIN pg_locks AS h ON h.locktype = 'transactionid' AND h.transactionid = l.transactionid AND h.granted
LEFT JOIN pg_stat_activity AS a ON a.pid = h.pid
WHERE l.pid = %s AND l.locktype = 'transactionid' AND NOT l.granted
"""


def waited_for(connection: Connection, pid: int) -> list[str]:
    """Return, in words, the transactions that a session which creates a slot waits for."""
    with connection.cursor() as cursor:
        cursor.execute(_WAITED_FOR, (pid,))
        return _in_words(cursor.fetchall())


def _in_words(found: Iterable[tuple[object, ...]]) -> list[str]:
    texts = []
    for row in found:
        gid, holder, user, application, since = (as_text(v) if isinstance(v, bytes) else v for v in row)
        if gid is not None:
            texts.append(f"the prepared transaction {gid!r}")
        elif holder is not None:
            name = f", {application}" if application else ""
            texts.append(f"the transaction of process {holder} (user {user}{name}, begun {since})")
    return texts


SETTLE_S = 0.5
"""For so long a statement that will change a table may have neither a transaction id nor a lock to wait for."""

# Whoever has a transaction id from before the horizon, prepared transactions too; and statements from before `since`
# that have got one later, or still wait to begin. A statement sees the event triggers that there were at its start.
_OLDER = """
SELECT x.gid::text, a.pid, a.usename::text, a.application_name::text, date_trunc('second', a.xact_start)::text,
       a.xact_start::text
FROM pg_locks AS l
LEFT JOIN pg_prepared_xacts AS x ON x.transaction = l.transactionid
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'transactionid' AND l.granted AND l.transactionid IN (
    SELECT i.id::xid FROM pg_snapshot_xip(pg_current_snapshot()) AS i (id) WHERE i.id < %(horizon)s::xid8)
UNION
SELECT NULL, a.pid, a.usename::text, a.application_name::text, date_trunc('second', a.xact_start)::text,
       a.xact_start::text
FROM pg_stat_activity AS a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
  AND a.backend_type NOT IN ('autovacuum worker', 'walsender') AND (
    (a.pid::text || ' ' || a.xact_start::text) = ANY (%(known)s)
    OR (a.state = 'active' AND a.query_start < %(since)s::timestamptz AND (a.backend_xid IS NOT NULL OR EXISTS (
        SELECT FROM pg_locks AS w WHERE w.pid = a.pid AND NOT w.granted AND w.locktype IN ('relation', 'object')))))
"""


def wait_for_older(connection: Connection, tell: Progress) -> None:
    """Wait until every transaction has ended that may have changed tables before now; a signal ends the wait.

    Args:
        connection: a session in autocommit mode.
        tell: is told what is waited for.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    told: set[str] = set()
    known: set[str] = set()
    begun = time.monotonic()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text, clock_timestamp()::text")
        ((horizon, since),) = (tuple(map(as_text, row)) for row in cursor.fetchall())
        while True:
            cursor.execute(_OLDER, {"horizon": horizon, "since": since, "known": sorted(known)})
            found = cursor.fetchall()
            # A statement that has waited may go on to change tables until its transaction ends.
            known |= {f"{row[1]} {as_text(row[5])}" for row in found if row[1] is not None and row[5] is not None}
            if not found and time.monotonic() - begun > SETTLE_S:
                return
            for text in _in_words(row[:5] for row in found):
                if text not in told:
                    told.add(text)
                    tell(f"waiting for {text} to end")
            time.sleep(POLL_S)
