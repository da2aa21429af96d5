"""Durability of what was applied: whether a crash of the server could still take it back, and seeing that it cannot."""

from __future__ import annotations

from psycopg2.extensions import cursor as Cursor  # noqa: N812

# With a transaction number and a record of its own the commit waits for the disk, and takes with it all that was
# committed before. The message has a prefix that capture leaves out.
_FLUSH = b"""
BEGIN; SET LOCAL synchronous_commit = on;
SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_logical_emit_message(true, 'pmgsync', 'flush'); COMMIT"""


def commit_setting(*, waits: bool) -> bytes:
    """Return the statement that says whether the session's commits wait for the disk."""
    return b"SET synchronous_commit = on" if waits else b"SET synchronous_commit = off"


def make_durable(cursor: Cursor) -> None:
    """Return when everything committed before is on disk. The session is in no transaction.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(b"SELECT pg_catalog.pg_current_wal_insert_lsn() <= pg_catalog.pg_current_wal_flush_lsn()")
    if cursor.fetchone() != (True,):
        cursor.execute(_FLUSH)
