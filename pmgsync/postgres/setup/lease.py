"""The lease in the database: until when a fenced master may write, by the server's own clock.

The broker's deadline is one of the machine's monotonic clock, which its processes share; the server only has a wall
clock. So the two are read together and the deadline is told in the server's time. Whatever delays the telling
afterwards does not make the lease longer. Should the wall clock be set back, the next renewal puts it right; while
nobody renews, the triggers notice when it is set back to before the renewal, else the lease lasts at most twice as
long.

The lease is a sequence: a transaction in REPEATABLE READ would see a row as it was, and a row would leave a dead one
each second. Commits are checked by one row per transaction: a deferred trigger per row would cost every bulk load.

What can still be written late, each for less than a lease if not said otherwise: under a clock that was set back while
nobody renews, as above; by a commit that stalls after its check, or by COMMIT PREPARED, or after SET CONSTRAINTS ALL
IMMEDIATE, for as long as that takes; in a virtual machine that its host stops, whose clocks stop with it. What such a
commit brings is past the fork: it is exported, not mixed in.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.session import connect

STATEMENT_MS = 2_000
"""Milliseconds after which a renewal is given up; the next one comes soon."""
LONGEST_S = 1_000.0
"""A master that needs nobody's word renews too."""
SHUT_S = 1.0
SHUT_POLL_S = 0.01


class LeaseSession:
    """A session that renews the lease, or closes. For one thread."""

    def __init__(self, dsn: str) -> None:
        """Open the session.

        Raises:
            UnreachableError: when the server does not let it in.
        """
        self._connection = connect(dsn, application_name="pmgsync lease")
        self._connection.autocommit = True
        with _errors(), self._connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {STATEMENT_MS}")

    def close(self) -> None:
        """End the session; the lease stays as it is."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def renew(self, until: float) -> None:
        """Let the master write until then, and no longer than that whatever was said before.

        Args:
            until: seconds of `time.monotonic`; what is past, closes. Of more than `LONGEST_S` the rest is for later.

        Raises:
            UnreachableError: when the session is lost.
            PmgsyncError: when the server refuses; what was said before stays.
        """
        with _errors(), self._connection.cursor() as cursor:
            cursor.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")
            row = cursor.fetchone()
            assert row is not None
            left_ms = math.floor(min(until - time.monotonic(), LONGEST_S) * 1000)
            cursor.execute("SELECT pmgsync.set_lease(%s)", (row[0] + left_ms if left_ms > 0 else None,))

    def reign(self) -> int:
        """Return the newest epoch for which this node may open its tables as master, 0 for none.

        Raises:
            UnreachableError: when the session is lost.
            PmgsyncError: when the server refuses.
        """
        with _errors(), self._connection.cursor() as cursor:
            return passed_reign(cursor)

    def shut(self) -> bool:
        """Close at once, without waiting for any lock. An open transaction that has written is refused at its commit.

        Returns:
            False when statements that were running did not end within `SHUT_S`. One of them may be a commit that was
            checked just before and is not done yet; what it brings is then past the end that is read now.

        Raises:
            UnreachableError: when the session is lost.
            PmgsyncError: when the server refuses.
        """
        with _errors(), self._connection.cursor() as cursor:
            cursor.execute("SELECT pmgsync.set_lease(NULL)")
            deadline = time.monotonic() + SHUT_S
            while True:
                cursor.execute(_RUNNING)
                if cursor.fetchone() == (0,):
                    return True
                if time.monotonic() > deadline:
                    return False
                time.sleep(SHUT_POLL_S)


def passed_reign(cursor: Cursor) -> int:
    """Return the newest epoch for which the sequences of this database were passed, 0 for none."""
    cursor.execute("SELECT epoch FROM pmgsync.reign")
    row = cursor.fetchone()
    return 0 if row is None else int(row[0])


def note_reign(cursor: Cursor, epoch: int) -> None:
    """Note that the sequences of this database were passed for an epoch: its tables may be opened. In the transaction
    that has set them.
    """
    cursor.execute(
        "INSERT INTO pmgsync.reign (epoch) VALUES (%s) ON CONFLICT (one) DO UPDATE "
        "SET epoch = greatest(pmgsync.reign.epoch, EXCLUDED.epoch)",
        (epoch,),
    )


_RUNNING = """
SELECT count(*) FROM pg_catalog.pg_locks AS l JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE l.relation = 'pmgsync.writer'::regclass AND l.mode = 'RowExclusiveLock' AND a.state = 'active'
  AND a.wait_event IS DISTINCT FROM 'SyncRep'
"""
"""Whoever waits for slaves has its commit in the WAL already, before anything that is read there from now on."""


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the lease could not be written ({str(error).strip()})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(f"the lease could not be written ({str(error).strip()})") from error
