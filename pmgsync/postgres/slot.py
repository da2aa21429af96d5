"""Creating a replication slot: says what it waits for, and can be given up without leaving a slot behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

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
        found = cursor.fetchall()
    texts = []
    for row in found:
        gid, holder, user, application, since = (as_text(v) if isinstance(v, bytes) else v for v in row)
        if gid is not None:
            texts.append(f"the prepared transaction {gid!r}")
        elif holder is not None:
            name = f", {application}" if application else ""
            texts.append(f"the transaction of process {holder} (user {user}{name}, begun {since})")
    return texts
