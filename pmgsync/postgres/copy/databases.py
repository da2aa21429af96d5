"""Whole databases of a server: made, renamed and dropped from a session in another one."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import psycopg2
import psycopg2.extensions

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.session import connect, quote_ident, quote_literal

log = logging.getLogger(__name__)

NEW_SUFFIX, OLD_SUFFIX = "_pmgsync_new", "_pmgsync_old"
PATIENCE_S = 30.0
POLL_S = 0.2


@contextlib.contextmanager
def maintenance(dsn: str, name: str) -> Iterator[psycopg2.extensions.cursor]:
    """Yield a cursor, in autocommit mode, in a database of the server that is not the named one.

    Raises:
        UnreachableError: when the server does not let the session in.
    """
    connection = None
    for candidate in ("postgres", "template1"):
        if candidate == name:
            continue
        try:
            connection = connect(dsn, dbname=candidate, application_name="pmgsync restore")
            break
        except UnreachableError:
            if candidate == "template1":
                raise
    assert connection is not None
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor
    except psycopg2.Error as error:
        raise PmgsyncError(f"the database {name} cannot be replaced ({str(error).strip()})") from error
    finally:
        with contextlib.suppress(psycopg2.Error):
            connection.close()


def clear_leftovers(cursor: psycopg2.extensions.cursor, name: str) -> None:
    """Remove what an interrupted restore left beside a database: an unfinished new one, a replaced old one."""
    for suffix in (NEW_SUFFIX, OLD_SUFFIX):
        if exists(cursor, name + suffix):
            log.warning("action=leftover database=%s", name + suffix)
            drop(cursor, name + suffix)


def terminate_sessions(cursor: psycopg2.extensions.cursor, *names: str) -> None:
    """End all sessions on these databases, replication among them; returns when the server has noticed, or in 5 s."""
    cursor.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = ANY(%s)", (list(names),)
    )


def drop(cursor: psycopg2.extensions.cursor, name: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            cursor.execute(as_sql(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)"))
            return
        except psycopg2.errors.ObjectInUse:
            # FORCE does not reach the walsender of a logical slot.
            if time.monotonic() > deadline:
                raise
            terminate_sessions(cursor, name)
            time.sleep(POLL_S)


def exists(cursor: psycopg2.extensions.cursor, name: str) -> bool:
    cursor.execute("SELECT count(*) FROM pg_database WHERE datname = %s", (name,))
    return cursor.fetchone() != (0,)


def quoted(name: str) -> str:
    return quote_ident(name.encode()).decode()


def literal(value: str) -> str:
    return quote_literal(value.encode()).decode()


def as_sql(statement: str) -> bytes:
    """As bytes: the session's encoding is SQL_ASCII, which psycopg2 would not write names of other scripts in."""
    return statement.encode()
