"""Stale tables: what cannot be taken from an origin because the schemas differ, until the table is fetched again.

Invariant: a change that was left out is covered by a row in pmgsync.stale_table, written by the transaction that left
it out. The row goes when the chain has passed the position that the fetched copy was taken at.

A table becomes stale by what PostgreSQL refuses because the tables differ: the table or a key column is missing here, a
type does not take a value, NOT NULL here that the origin does not have, the column that a merge compares by is missing.
A column that is missing here is dropped and the rest of the row is applied; the table is fetched when the column is
there. A name that has another OID on the origin than before is another table, and is fetched: what that table held
when it got the name is not in the stream.

The fetch goes on beside the chain. The chain pauses at P; the copy is taken at V on the origin itself, so V >= P, which
is checked. The copy replaces the table in one local transaction that also writes `until = V`; the position stays at P.
From then on the table's changes at or below V are skipped: the copy has every transaction up to V and none after. Those
above V are applied. So each change counts exactly once, without buffering and without moving the other tables.
(Applying up to V first is not possible: V is known only once the copy is taken.)

A fetch waits until the catalog does not say that it would be in vain. Then it is tried. After a failure it is tried
again when one of the schemas has changed, or after 30 s, 60 s … 15 min: only the rows tell whether they fit a type.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.backoff import Backoff
from pmgsync.core.pgoutput import Relation
from pmgsync.core.positions import format_lsn, parse_lsn
from pmgsync.postgres.session import quote_literal, rows

log = logging.getLogger(__name__)

Kind = Literal["table", "columns", "none"]
TableName = tuple[bytes, bytes]
"""Schema and name."""

FIRST_PAUSE_S = 30.0
"""A failed fetch is tried again after this time, twice as long each time, or as soon as one of the schemas changes."""
LONGEST_PAUSE_S = 900.0
UNREACHABLE_PAUSE_S = 3.0


@dataclass(frozen=True, slots=True)
class StaleTable:
    """What is left out of a table.

    Attributes:
        kind: `table`: every change; `columns`: the values of those columns; `none`: nothing any more.
        reason: a sentence's end that says why.
        lsn: of the first transaction that something was left out of.
        until: changes at or below this LSN are in the copy that was fetched.
    """

    schema: bytes
    name: bytes
    kind: Kind
    reason: str
    columns: tuple[bytes, ...] = ()
    lsn: int = 0
    until: int = 0

    @property
    def key(self) -> TableName:
        """Its schema and name."""
        return self.schema, self.name

    @property
    def label(self) -> str:
        """Its name for people."""
        return ".".join(part.decode(errors="backslashreplace") for part in self.key)


@dataclass(slots=True)
class _Attempt:
    signature: object
    backoff: Backoff
    not_before: float
    on_change: bool
    """Tried as soon as the signature is another one, before the pause is over."""


class StaleTables:
    """One origin's stale tables as its applier sees them; lives as long as the worker, across sessions.

    Attributes:
        tables: as in pmgsync.stale_table and the open transaction.
        relations: the OIDs of the origin's tables that have been met.
        newest: how the origin last described a table, since this object was made.
    """

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.tables: dict[TableName, StaleTable] = {}
        self.relations: dict[TableName, int] = {}
        self.newest: dict[TableName, Relation] = {}
        self._attempts: dict[TableName, _Attempt] = {}
        self._told: set[tuple[TableName, str]] = set()

    def load(self, cursor: Cursor) -> None:
        """Read what is committed.

        Raises:
            psycopg2.Error: when it cannot be read.
        """
        cursor.execute(
            b"SELECT t.schema, t.name, t.kind, t.reason, t.lsn::text, t.until::text, c.name "
            b"FROM pmgsync.stale_table AS t LEFT JOIN LATERAL pg_catalog.unnest(t.columns) AS c (name) ON true "
            b"WHERE t.origin = %d" % self.origin
        )
        tables: dict[TableName, StaleTable] = {}
        for schema, name, kind, reason, lsn, until, column in rows(cursor):
            assert schema is not None and name is not None and kind is not None and reason is not None
            assert lsn is not None and until is not None
            known = tables.get((schema, name)) or StaleTable(
                schema, name, kind.decode(), reason.decode(errors="replace"), (),  # type: ignore[arg-type]
                parse_lsn(lsn.decode()), parse_lsn(until.decode()),
            )  # fmt: skip
            tables[known.key] = known if column is None else replace(known, columns=(*known.columns, column))
        cursor.execute(b"SELECT schema, name, relation FROM pmgsync.relation WHERE origin = %d" % self.origin)
        found = {(s, n): int(r) for s, n, r in rows(cursor) if s is not None and n is not None and r is not None}
        before = {table.key for table in self.waiting()}
        self.tables, self.relations = tables, found
        for table in self.waiting():
            if table.key not in before:
                # Somebody else has noted it, `pmgcm resync` or `verify --repair`, and waits for it.
                self._attempts.pop(table.key, None)

    def skips(self, key: TableName, lsn: int) -> bool:
        """Return True when a table's changes at an LSN are to be left out."""
        known = self.tables.get(key)
        return known is not None and (known.kind == "table" or lsn <= known.until)

    def note(self, table: StaleTable) -> StaleTable:
        """Note what is left out from now on, in addition to what was; return what is to be written."""
        known = self.tables.get(table.key)
        if known is not None and known.kind != "none":
            kind: Kind = "table" if "table" in {known.kind, table.kind} else "columns"
            columns = tuple(dict.fromkeys((*known.columns, *table.columns)))
            table = replace(table, kind=kind, columns=columns, lsn=known.lsn)
        if known is not None:
            table = replace(table, until=known.until)
        self.tables[table.key] = table
        if (table.key, table.reason) not in self._told:
            self._told.add((table.key, table.reason))
            log.warning(
                "action=stale origin=%d table=%s kind=%s lsn=%s reason=%s",
                self.origin, table.label, table.kind, format_lsn(table.lsn), table.reason,
            )  # fmt: skip
        return table

    def record(self, table: StaleTable) -> bytes:
        """Return the statement that writes it down."""
        return record(self.origin, table)

    def record_relation(self, relation: tuple[bytes, bytes, int]) -> bytes:
        """Return the statement that writes down which table a name is."""
        schema, name, oid = relation
        return (
            b"INSERT INTO pmgsync.relation (origin, schema, name, relation) VALUES (%d, %s, %s, %d) "
            b"ON CONFLICT (origin, schema, name) DO UPDATE SET relation = EXCLUDED.relation"
            % (self.origin, quote_literal(schema), quote_literal(name), oid)
        )

    def forget(self, cursor: Cursor, key: TableName) -> None:
        """Forget a table that is gone on the origin.

        Raises:
            psycopg2.Error: when it cannot be written.
        """
        if key in self.tables or key in self.relations:
            cursor.execute(b";".join(forget(self.origin, [key])))
        self.tables.pop(key, None)
        self.relations.pop(key, None)
        self.newest.pop(key, None)

    # -- when the schemas agree again

    def waiting(self) -> list[StaleTable]:
        """Return the tables that are to be fetched as soon as they can be."""
        return [table for table in self.tables.values() if table.kind != "none"]

    def due(self, key: TableName, signature: object) -> bool:
        """Return False when a fetch has failed and nothing has changed since."""
        attempt = self._attempts.get(key)
        if attempt is None:
            return True
        if time.monotonic() >= attempt.not_before:
            return True
        return attempt.on_change and attempt.signature != signature

    def tried(self, keys: Iterable[TableName], signatures: dict[TableName, object]) -> None:
        """Note that a fetch begins; it counts as failed until it is known to have succeeded."""
        for key in keys:
            before = self._attempts.get(key)
            backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S) if before is None else before.backoff
            not_before = time.monotonic() + backoff.failed()
            self._attempts[key] = _Attempt(signatures.get(key), backoff, not_before, on_change=True)

    def fetched(self, keys: Iterable[TableName]) -> None:
        """Note that it succeeded. The next one waits for a change all the same: rows that do not fit may come again."""
        for key in keys:
            self._attempts[key].backoff.succeeded()
            self._told = {told for told in self._told if told[0] != key}

    def unreachable(self, keys: Iterable[TableName]) -> None:
        """Note that it failed for a reason that has nothing to do with the tables."""
        for key in keys:
            not_before = time.monotonic() + UNREACHABLE_PAUSE_S
            self._attempts[key] = _Attempt(None, Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S), not_before, on_change=False)

    def sweep(self, cursor: Cursor, position: int) -> None:
        """Forget the fetched tables whose copies the chain has passed.

        Raises:
            psycopg2.Error: when it cannot be written.
        """
        over = [table for table in self.tables.values() if table.kind == "none" and table.until <= position]
        for table in over:
            cursor.execute(
                b"DELETE FROM pmgsync.stale_table WHERE origin = %d AND schema = %s AND name = %s AND kind = 'none'"
                % (self.origin, quote_literal(table.schema), quote_literal(table.name))
            )
            del self.tables[table.key]
            log.info("action=stale-over origin=%d table=%s", self.origin, table.label)

    def alerts(self) -> tuple[dict[str, str], ...]:
        """Return what status is to say."""
        return tuple(
            {
                "kind": "stale",
                "text": f"{table.label} is not kept in step with node {self.origin}: {table.reason}; it is fetched "
                "anew by itself as soon as the table is the same on both nodes",
            }
            for table in self.waiting()
        )


def record(origin: int, table: StaleTable) -> bytes:
    """Return the statement that writes down what is left out of a table."""
    columns = b", ".join(map(quote_literal, table.columns))
    return (
        b"INSERT INTO pmgsync.stale_table (origin, schema, name, kind, reason, columns, lsn, until) "
        b"VALUES (%d, %s, %s, '%s', %s, ARRAY[%s]::name[], '%s', '%s') "
        b"ON CONFLICT (origin, schema, name) DO UPDATE SET kind = EXCLUDED.kind, reason = EXCLUDED.reason, "
        b"columns = EXCLUDED.columns, lsn = EXCLUDED.lsn, until = EXCLUDED.until"
        % (
            origin, quote_literal(table.schema), quote_literal(table.name), table.kind.encode(),
            quote_literal(table.reason.encode("ascii", errors="backslashreplace")), columns,
            format_lsn(table.lsn).encode(), format_lsn(table.until).encode(),
        )
    )  # fmt: skip


def forget(origin: int, keys: Collection[TableName] | None) -> list[bytes]:
    """Return the statements that forget what is known of an origin's tables: of these, or of all."""
    where = b"origin = %d" % origin
    if keys is not None:
        pairs = b", ".join(b"(%s, %s)" % (quote_literal(schema), quote_literal(name)) for schema, name in keys)
        where += b" AND (schema, name) IN (%s)" % pairs
    return [b"DELETE FROM pmgsync.%s WHERE %s" % (table, where) for table in (b"stale_table", b"relation")]
