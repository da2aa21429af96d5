"""The replication origin of a session: it marks what is written there as another node's, so that capture leaves it."""

from __future__ import annotations

import time

import psycopg2
import psycopg2.errors
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.postgres.names import origin_name

POLL_S = 0.02


def take_origin(cursor: Cursor, cid: int, *, patience_s: float) -> None:
    """Make the session the one of a node's origin; there is at most one. Makes the origin when there is none.

    The server takes a moment to end the session that a predecessor has closed.

    Args:
        cursor: of a session in autocommit mode.
        cid: the node whose changes will be written.
        patience_s: seconds that another session of the origin is given to end.

    Raises:
        psycopg2.errors.ObjectInUse: when another session has it and keeps it.
    """
    name = origin_name(cid)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            cursor.execute(
                "SELECT pg_catalog.pg_replication_origin_create(%s) "
                "WHERE pg_catalog.pg_replication_origin_oid(%s) IS NULL",
                (name, name),
            )
            cursor.execute("SELECT pg_catalog.pg_replication_origin_session_setup(%s)", (name,))
            return
        except psycopg2.errors.UniqueViolation:
            continue  # made by another session at the same instant
        except psycopg2.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
