"""Maintenance: what an applier does every few seconds beside applying: stale tables, conflict log, rows to repair."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.pgoutput import Relation
from pmgsync.core.positions import parse_lsn
from pmgsync.core.profile import TableRule
from pmgsync.errors import ApplyError, UnreachableError
from pmgsync.postgres.apply.stale import StaleTable, StaleTables, TableName
from pmgsync.postgres.apply.target import load_target
from pmgsync.postgres.session import connect, quote_literal, rows

log = logging.getLogger(__name__)

CONFLICTS_KEPT = 10_000
"""Of each origin: the log must not fill a disk."""
REPAIRED_AT_ONCE = 1000
REPAIR_LOCK_S = 1
FAILURES_SHOWN = 5

_SHAPE = b"""
SELECT a.attname, a.atttypid::int8, a.atttypmod, a.attnotnull, a.atthasdef, c.oid::int8
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p') ORDER BY a.attnum"""


def applied(cursor: Cursor, origin: int) -> tuple[int, int] | None:
    """Return how far the chain of an origin is applied here, incarnation and LSN; None when nothing of it is.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(b"SELECT incarnation, lsn::text FROM pmgsync.position WHERE origin = %d" % origin)
    for incarnation, lsn in rows(cursor):
        assert incarnation is not None and lsn is not None
        return int(incarnation), parse_lsn(lsn.decode())
    return None


def agreed(cursor: Cursor, table: StaleTable, newest: Relation | None, rule: TableRule | None) -> object | None:
    """Return what fetching a table depends on, None when the catalog says already that it would be in vain.

    Args:
        newest: how the origin described the table last, None when that is not known.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(_SHAPE % (quote_literal(table.schema), quote_literal(table.name)))
    shape = rows(cursor)
    if not shape:
        return None
    columns = {row[0] for row in shape if row[0] is not None}
    theirs = None if newest is None else {column.name for column in newest.columns}
    lacking = [name for name in table.columns if name not in columns and (theirs is None or name in theirs)]
    if table.kind == "columns" and lacking:
        return None
    if newest is not None and rule is not None:
        try:
            target = load_target(cursor, newest, rule, 0)
        except ApplyError:
            return None
        if table.kind == "table" and any(column.required for column in target.rest):
            return None
    return (tuple(shape), None if newest is None else newest.raw)


def fetchable(
    cursor: Cursor, stale: StaleTables, rule: Callable[[Relation], TableRule | None]
) -> dict[TableName, object]:
    """Return the stale tables that can be fetched anew now, with what fetching them depends on.

    Args:
        rule: returns what the profile says of a table.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    found: dict[TableName, object] = {}
    for table in stale.waiting():
        newest = stale.newest.get(table.key)
        signature = agreed(cursor, table, newest, None if newest is None else rule(newest))
        if signature is not None and stale.due(table.key, signature):
            found[table.key] = signature
    return found


def trim_conflicts(cursor: Cursor, origin: int, trimmed: int, conflicts: int) -> int:
    """Keep the newest conflicts of an origin when there were new ones since; returns how many there had been now.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    if conflicts != trimmed:
        cursor.execute(
            b"DELETE FROM pmgsync.conflict WHERE origin = %d AND id <= "
            b"(SELECT pg_catalog.max(id) FROM pmgsync.conflict WHERE origin = %d) - %d"
            % (origin, origin, CONFLICTS_KEPT)
        )
    return conflicts


def schema_failures(cursor: Cursor, origin: int) -> list[str]:
    """Return what status is to say of changes of the schema that could not be repeated, the newest first.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(
        b"SELECT id, change, error FROM pmgsync.schema_failure WHERE origin = %d ORDER BY id DESC LIMIT %d"
        % (origin, FAILURES_SHOWN)
    )
    return [
        f"a change of the schema on node {origin} could not be repeated here: {_text(change)}: {_text(error)}; "
        f"make it by hand, then DELETE FROM pmgsync.schema_failure WHERE id = {_text(number)}"
        for number, change, error in rows(cursor)
    ]


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="backslashreplace")


def repairs_wait(cursor: Cursor, origin: int) -> bool:
    """Return True when there are rows to be published again.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    cursor.execute(b"SELECT 1 FROM pmgsync.repair WHERE origin = %d LIMIT 1" % origin)
    return bool(cursor.fetchall())


def republish(dsn: str, origin: int) -> None:
    """Publish rows again that were merged into something that their origin may not know.

    In a session without the origin's name, for capture must send them. What cannot be done now is done next time.
    """
    try:
        with contextlib.closing(connect(dsn, application_name="pmgsync repair", replica=True)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"SET lock_timeout = '{REPAIR_LOCK_S}s'")
                cursor.execute("SELECT pmgsync.republish(%s, %s)", (origin, REPAIRED_AT_ONCE))
                count = cursor.fetchone()
    except (psycopg2.Error, UnreachableError) as error:
        log.info("action=repair-later origin=%d error=%s", origin, str(error).strip())
    else:
        if count is not None and count[0]:
            log.info("action=repair origin=%d rows=%d", origin, count[0])
