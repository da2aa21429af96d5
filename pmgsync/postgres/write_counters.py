"""How often tables were written, as PostgreSQL counts it: another count than before means that a table has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import psycopg2
import psycopg2.extensions

from pmgsync.errors import UnreachableError
from pmgsync.postgres.catalog import as_bytes, as_text
from pmgsync.postgres.session import connect, quote_literal

_COUNTS = b"""
SELECT s.relname, concat_ws('/', s.n_tup_ins, s.n_tup_upd, s.n_tup_del, pg_postmaster_start_time(),
    pg_relation_filenode(s.relid))
FROM pg_stat_user_tables AS s WHERE s.schemaname = 'public' AND s.relname IN (%s)
"""


class WriteCounters:
    """A session that is kept open between two looks, which come every second.

    The server's start counts too: a crash takes the newest counts away, and an action too many does no harm. So does
    the file on disk, which TRUNCATE replaces without counting rows.
    """

    def __init__(self, dsn: str, tables: Collection[str]) -> None:
        """`tables`: names in schema public."""
        self._dsn = dsn
        self._query = _COUNTS % b", ".join(quote_literal(as_bytes(name)) for name in tables)
        self._connection: psycopg2.extensions.connection | None = None

    def read(self) -> dict[str, str]:
        """Return a text for each table, which is another one when it was written since.

        Raises:
            UnreachableError: when the server does not answer.
        """
        try:
            if self._connection is None:
                self._connection = connect(self._dsn, application_name="pmgsync actions")
                self._connection.autocommit = True
            with self._connection.cursor() as cursor:
                cursor.execute(self._query)
                return {as_text(name): as_text(count) for name, count in cursor.fetchall()}
        except psycopg2.Error as error:
            self.close()
            raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error

    def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):  # it is over either way
                self._connection.close()
            self._connection = None
