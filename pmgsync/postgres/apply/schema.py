"""Repeating a change of the schema: as the same role, with the same search path, and then the tables are compared."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.ddl import MissingContent, SchemaChange, TableShape
from pmgsync.core.positions import format_lsn
from pmgsync.errors import TransientApplyError
from pmgsync.postgres.apply.failures import apply_error, one_line
from pmgsync.postgres.apply.plan import NoteItem, SchemaItem
from pmgsync.postgres.apply.stale import StaleTable, StaleTables
from pmgsync.postgres.session import PINNED, quote_ident, quote_literal, rows

log = logging.getLogger(__name__)

KEPT = 1000
"""Failures that are kept, the newest."""
_STATEMENT_CHARACTERS = 100_000


def repeat(cursor: Cursor, item: SchemaItem, stale: StaleTables) -> list[NoteItem]:
    """Repeat a change in the open transaction, and return what is to be noted of the tables it is about.

    One that cannot be repeated is written down in pmgsync.schema_failure, and the chain goes on: rows that do not fit
    any more make their table stale.

    Raises:
        psycopg2.Error: when trying again may help, or the server is gone.
    """
    change = item.change
    cursor.execute(b"SAVEPOINT schema")
    problem = ""
    try:
        _execute(cursor, change)
    except psycopg2.Error as error:
        if isinstance(apply_error(error, origin=stale.origin, table="", lsn=item.lsn), TransientApplyError):
            raise
        cursor.execute(b"ROLLBACK TO SAVEPOINT schema")
        if not _is_gone(error, change):
            problem = one_line(error)
    cursor.execute(b"RELEASE SAVEPOINT schema")
    if problem:
        _write_down(cursor, item, stale.origin, problem)
    for key in change.dropped:
        stale.forget(cursor, key)
    return [note for table in change.tables for note in _compare(cursor, table, stale, item.lsn, failed=bool(problem))]


def missing(tables: Iterable[MissingContent], stale: StaleTables, lsn: int) -> list[NoteItem]:
    """Return what is to be noted of tables whose content the stream does not have."""
    notes = []
    for table in tables:
        reason = "what it held when it was published is not in the stream"
        notes.append(NoteItem(relation=table))
        notes.append(NoteItem(stale=stale.note(StaleTable(table.schema, table.name, "table", reason, lsn=lsn))))
    return notes


def _execute(cursor: Cursor, change: SchemaChange) -> None:
    """Execute the statement as the origin did; the session is as before when it is done."""
    if not change.statement:
        raise _UnknownTextError(
            "the text of the statement is not known: it was executed inside a function that is not PL/pgSQL, or is too "
            "long"
        )
    before = dict(PINNED)
    # What a function's body refers to need not be here yet, and defaults of this node's do not count.
    script = [b"SET LOCAL check_function_bodies = off"]
    script += [b"SET LOCAL %s = %s" % (name.encode(), quote_literal(value)) for name, value in change.settings]
    path = b", ".join(map(quote_ident, change.path)) or b"''"
    script += [b"SET LOCAL search_path = " + path, b"SET LOCAL ROLE " + quote_ident(change.role)]
    cursor.execute(b";".join(script))
    cursor.execute(change.statement)
    again = [b"SET LOCAL ROLE NONE", b"RESET check_function_bodies"]
    again += [
        b"SET LOCAL %s = %s" % (name.encode(), quote_literal(before[name].encode()))
        for name in ("search_path", *(name for name, _ in change.settings))
    ]
    cursor.execute(b";".join(again))


class _UnknownTextError(psycopg2.ProgrammingError):
    """There is nothing to execute."""


def _is_gone(error: psycopg2.Error, change: SchemaChange) -> bool:
    """Return True when something was to be dropped that is not here."""
    return change.tag.startswith("DROP ") and error.pgcode in {"42P01", "42704", "42883", "3F000"}


def _compare(cursor: Cursor, table: TableShape, stale: StaleTables, lsn: int, *, failed: bool) -> list[NoteItem]:
    """Return what is to be noted of a table that was changed: which one it is there, and that it is to be fetched."""
    notes = [NoteItem(relation=(table.schema, table.name, table.oid))]
    # A copy is fetched by the table's name: another table may have had it by then.
    early = any(
        known.until > lsn and (key == (table.schema, table.name) or stale.relations.get(key) == table.oid)
        for key, known in stale.tables.items()
    )
    cursor.execute(
        b"SELECT pmgsync.shape(c.oid) FROM pg_catalog.pg_class AS c "
        b"JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace "
        b"WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')"
        % (quote_literal(table.schema), quote_literal(table.name))
    )
    found = rows(cursor)
    reason = ""
    if not found:
        reason = "it could not be made here"
    elif found[0][0] != table.shape:
        reason = "its columns are not the same here"
    elif table.rewritten:
        reason = "its rows were written anew on the origin"
    elif failed:
        reason = "a change of it could not be repeated here"
    elif early:
        reason = "its copy here is newer than a change of it"
    if reason:
        noted = StaleTable(table.schema, table.name, "table", reason, lsn=lsn)
        notes.append(NoteItem(stale=stale.note(noted)))
    return notes


def _write_down(cursor: Cursor, item: SchemaItem, origin: int, problem: str) -> None:
    change = item.change
    log.warning(
        "action=schema-failed origin=%d lsn=%s change=%s error=%s",
        origin, format_lsn(item.lsn), change.label, problem,
    )  # fmt: skip
    label = change.label.encode("ascii", errors="backslashreplace")
    cursor.execute(
        b"INSERT INTO pmgsync.schema_failure (origin, lsn, change, statement, error) VALUES (%d, '%s', %s, %s, %s)"
        % (
            origin, format_lsn(item.lsn).encode(), quote_literal(label),
            quote_literal(change.statement[:_STATEMENT_CHARACTERS]),
            quote_literal(problem.encode("ascii", errors="backslashreplace")),
        )
    )  # fmt: skip
    cursor.execute(
        b"DELETE FROM pmgsync.schema_failure WHERE id <= (SELECT pg_catalog.max(id) FROM pmgsync.schema_failure) - %d"
        % KEPT
    )
