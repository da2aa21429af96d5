"""Durability of what was applied: whether a crash of the server could still take it back, and seeing that it cannot.

With `synchronous_commit = "off"` a commit can be read before it is on disk, so visible and durable are two positions.
The apply worker has it flushed when nothing more has come for 50 ms, and every 200 ms in any case. Only what is flushed
counts: for acks, `pmgcm wait`, retention and the lag. At its start the worker flushes what it finds, which another
session may have committed an instant ago. After a crash the rest is applied again. With `"on"`, under load, one fsync
covers all frames that waited for the one before. The flush is a logical message in a transaction of its own, because
PostgreSQL has no function for it; none is made when the WAL is on disk to its end.
"""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor  # noqa: N812

# With a transaction number and a record of its own the commit waits for the disk, and takes with it all that was
# committed before. The message has a prefix that capture leaves out.
_FLUSH = b"""
BEGIN; SET LOCAL synchronous_commit = local;
SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_logical_emit_message(true, 'pmgsync', 'flush'); COMMIT"""


def commit_setting(*, waits: bool) -> bytes:
    """Return the statement that says whether the session's commits wait for the disk."""
    return b"SET synchronous_commit = local" if waits else b"SET synchronous_commit = off"


def make_durable(cursor: Cursor) -> None:
    """Return when everything committed before is on disk. The session is in no transaction.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(b"SELECT pg_catalog.pg_current_wal_insert_lsn() <= pg_catalog.pg_current_wal_flush_lsn()")
    if cursor.fetchone() != (True,):
        cursor.execute(_FLUSH)
