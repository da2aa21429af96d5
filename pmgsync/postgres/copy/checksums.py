"""Checksums of tables: by chunk, and by row in the chunks that differ, with the same text formats on every node.

Chunks are by hash of the key, so that tables without a key, and keys that only the profile knows, are compared like
all others; each look at a table is one scan. Repair does not write single rows: from outside the chain it could put an
older value over one that had just been applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import psycopg2
import psycopg2.extensions

from pmgsync.core.comparisons import Row, Sum
from pmgsync.core.profile import Profile, TableRule
from pmgsync.errors import PmgsyncError, ProtocolError, UnreachableError
from pmgsync.postgres.catalog import Table, as_bytes, list_tables, synchronised
from pmgsync.postgres.session import connect, quote_ident, quote_literal

MAX_CHUNKS = 4096
ROWS_IN_CHUNK = 1000
BYTES_OF_ROW = 500
"""Chunks are reckoned with at least a row for so many bytes: PostgreSQL's own number may be old, or missing."""
MAX_ROWS = 300_000
"""So many rows may be in the chunks that are asked for at once. Fewer would be told of as if they were all."""
APPLICATION = "pmgsync verify"


@dataclass(frozen=True, slots=True)
class Compared:
    """A table that is compared, and how.

    Attributes:
        key: the columns that name a row; all compared columns where the table has no key.
        columns: those whose values must be the same.
        estimate: of its rows.
    """

    table: Table
    rule: TableRule
    key: tuple[bytes, ...]
    columns: tuple[bytes, ...]
    estimate: int

    @property
    def chunks(self) -> int:
        """Into how many chunks its rows are divided; every node must use the same number."""
        return max(1, min(MAX_CHUNKS, self.estimate // ROWS_IN_CHUNK))


@contextlib.contextmanager
def checking(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    """Yield a session that reads; what goes wrong becomes this project's errors.

    Raises:
        PmgsyncError: when the database cannot be read.
    """
    with contextlib.closing(connect(dsn, application_name=APPLICATION)) as connection:
        connection.autocommit = True
        try:
            yield connection
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
        except psycopg2.Error as error:
            raise PmgsyncError(f"the tables could not be compared ({str(error).strip()})") from error


def compared_tables(connection: psycopg2.extensions.connection, profile: Profile) -> list[Compared]:
    """Return the tables whose rows are kept the same."""
    found = []
    with connection.cursor() as cursor:
        for table, rule in synchronised(list_tables(connection), profile):
            columns = table.copied(rule.local_columns)
            named = tuple(map(as_bytes, rule.key)) or table.primary_key or table.replica_key or columns
            # A key that this node makes by itself names nothing on another.
            key = named if set(named) <= set(columns) else columns
            cursor.execute(
                "SELECT greatest(reltuples, pg_relation_size(oid) / %s)::bigint FROM pg_class WHERE oid = %s",
                (BYTES_OF_ROW, table.oid),
            )
            row = cursor.fetchone()
            found.append(Compared(table, rule, key, columns, int(row[0]) if row else 0))
    return found


def chunk_sums(connection: psycopg2.extensions.connection, table: Compared, chunks: int) -> dict[int, Sum]:
    """Return of each chunk how many rows it has, and the sum of their digests."""
    with connection.cursor() as cursor:
        cursor.execute(
            b"SELECT x.chunk, count(*), sum(('x' || substr(x.digest, 1, 15))::bit(60)::bigint)::text FROM "
            b"(SELECT %s AS chunk, %s AS digest FROM ONLY %s) AS x GROUP BY 1"
            % (_chunk(table, chunks), _digest(table.columns), table.table.quoted)
        )
        return {int(chunk): (int(count), int(total)) for chunk, count, total in cursor.fetchall()}


def rows_in_chunks(
    connection: psycopg2.extensions.connection, table: Compared, chunks: int, wanted: Collection[int]
) -> dict[bytes, Row]:
    """Return the rows of some chunks by key: digest and owner; equal rows of a table without a key are counted.

    Raises:
        ProtocolError: when there are more than `MAX_ROWS`.
    """
    owner = quote_ident(as_bytes(table.rule.owner)) + b"::text" if table.rule.owner else b"''"
    with connection.cursor() as cursor:
        cursor.execute(
            b"SELECT %s, md5(string_agg(x.digest, '' ORDER BY x.digest)), min(x.owner) FROM "
            b"(SELECT %s AS chunk, %s AS key, %s AS digest, %s AS owner FROM ONLY %s) AS x "
            b"WHERE x.chunk IN (%s) GROUP BY x.key LIMIT %d"
            % (
                b"x.key",
                _chunk(table, chunks),
                _text(table.key),
                _digest(table.columns),
                owner,
                table.table.quoted,
                b", ".join(b"%d" % number for number in wanted),
                MAX_ROWS + 1,
            )
        )
        if cursor.rowcount > MAX_ROWS:
            raise ProtocolError(
                f"more than {MAX_ROWS} rows are in the {len(wanted)} of {chunks} chunks that were asked for",
                hint="ANALYZE the table on the master; then it is divided into more chunks",
            )
        return {bytes(key): (bytes(digest), bytes(who or b"")) for key, digest, who in cursor.fetchall()}


DIFFERING = "rows differ from those of the node that answers for them"


def fetch_again(dsn: str, origin: int, tables: Collection[tuple[bytes, bytes]], reason: str = DIFFERING) -> None:
    """Have apply fetch what an origin answers for of some tables, in its place among the origin's changes.

    They count as stale from now on, which is how everything is fetched that a chain does not bring. Apply's session is
    ended, so that it sees that: it begins anew at once.

    Args:
        tables: schema and name.
        reason: the end of the sentence that says why.

    Raises:
        PmgsyncError: when it cannot be written.
    """
    listed = b", ".join(b"(%s, %s)" % (quote_literal(schema), quote_literal(name)) for schema, name in tables)
    with checking(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            b"INSERT INTO pmgsync.stale_table (origin, schema, name, kind, reason, lsn) "
            b"SELECT p.origin, t.schema::name, t.name::name, 'table', "
            b"%s, p.lsn "
            b"FROM pmgsync.position AS p, (VALUES %s) AS t (schema, name) WHERE p.origin = %d "
            b"ON CONFLICT (origin, schema, name) DO UPDATE SET kind = 'table', reason = EXCLUDED.reason"
            % (quote_literal(reason.encode()), listed, origin)
        )
        if cursor.rowcount != len(tables):
            raise ProtocolError(f"this node has applied nothing of the chain of node {origin}")
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = %s",
            (f"pmgsync apply {origin}",),
        )


def _text(columns: Sequence[bytes]) -> bytes:
    return b"ROW(%s)::text" % b", ".join(quote_ident(column) + b"::text" for column in columns)


def _digest(columns: Sequence[bytes]) -> bytes:
    return b"md5(%s)" % _text(columns)


def _chunk(table: Compared, chunks: int) -> bytes:
    return b"(('x' || substr(md5(%s), 1, 7))::bit(28)::int %% %d)" % (_text(table.key), chunks)
