"""A node's own rows in its database, in numbers, and who uses it, for the person who gives the database up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg2
import psycopg2.extensions

from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.postgres.catalog import Table, as_bytes, as_text, list_tables, synchronised
from pmgsync.postgres.session import quote_ident

Connection = psycopg2.extensions.connection


@dataclass(frozen=True, slots=True)
class OwnRows:
    """The rows of a table that nodes own.

    Attributes:
        table: as messages write it.
        oldest: the date of the oldest one, YYYY-MM-DD; "" when the profile does not say which column has it.
    """

    table: str
    rows: int
    oldest: str


def count_own_rows(connection: Connection, profile: Profile) -> list[OwnRows]:
    """Return the owned tables that have rows; they are counted, which may take a while.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    owned = [(table, rule) for table, rule in synchronised(list_tables(connection), profile) if _is_own(rule)]
    found = [_count(connection, table, rule) for table, rule in owned]
    return [rows for rows in found if rows.rows]


def _is_own(rule: TableRule) -> bool:
    return rule.policy is Policy.OWNED or rule.inserts_by_owner is not None


def _count(connection: Connection, table: Table, rule: TableRule) -> OwnRows:
    oldest = b"NULL"
    dated = next((column for column in table.columns if as_text(column.name) == rule.dated_by), None)
    if dated is not None:
        least = b"min(" + quote_ident(dated.name) + b")"
        whole = dated.type in {b"integer", b"bigint"}
        oldest = b"to_char(%s, 'YYYY-MM-DD')" % (b"to_timestamp(%s)" % least if whole else least)
    with connection.cursor() as cursor:
        cursor.execute(b"SELECT count(*), %s FROM ONLY %s" % (oldest, table.quoted))
        row = cursor.fetchone()
    assert row is not None
    return OwnRows(as_text(table.name), row[0], "" if row[1] is None else as_text(row[1]))


def highest_owner(connection: Connection, profile: Profile) -> int:
    """Return the highest CID that rows have, from an earlier cluster or a backup of one; 0 when none has any.

    A node of a new cluster that got that CID would answer for those rows, and number its own like them. What is longer
    than four digits is no CID that a cluster has come to.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    highest = 0
    with connection.cursor() as cursor:
        for table, rule in synchronised(list_tables(connection), profile):
            owner = rule.owner or rule.inserts_by_owner
            if owner is None:
                continue
            column = quote_ident(as_bytes(owner))
            cursor.execute(
                b"SELECT max(btrim(x.cid)::int) FROM (SELECT DISTINCT %s::text AS cid FROM ONLY %s) AS x "
                b"WHERE btrim(x.cid) ~ '^[0-9]{1,4}$'" % (column, table.quoted)
            )
            row = cursor.fetchone()
            highest = max(highest, (row[0] if row else None) or 0)
    return highest


def list_users(cursor: psycopg2.extensions.cursor, database: str) -> list[tuple[str, int]]:
    """Return who has sessions on a database, pmgsync aside: the names that programs give themselves, and how many each.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(
        "SELECT coalesce(nullif(application_name, ''), usename::text, 'unknown'), count(*) FROM pg_stat_activity "
        "WHERE datname = %s AND backend_type = 'client backend' AND pid <> pg_backend_pid() "
        "AND application_name !~ '^(pmgsync|pmgcm)' GROUP BY 1 ORDER BY 1",
        (database,),
    )
    return [(as_text(name), count) for name, count in cursor.fetchall()]


def schema_digest(connection: Connection, profile: Profile) -> str:
    """Return a digest of the synchronised tables' names, columns and types, "" when there are none.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    tables = [table for table, _ in synchronised(list_tables(connection), profile)]
    return digest_of(tables) if tables else ""


def digest_of(tables: Sequence[Table]) -> str:
    """Return the digest of tables; neither their order nor that of their columns counts. Pure."""
    lines = []
    for table in tables:
        columns = sorted((column.name, column.type) for column in table.columns)
        lines.append(b"\0".join([table.schema, table.name, *(part for column in columns for part in column)]))
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()
