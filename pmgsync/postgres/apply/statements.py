"""Statements: the SQL of one row change on a target, with numbered parameters. Pure; nothing is executed here.

A statement's parameters are listed as (row, place): which of the two rows of a change, and which value of it. Rows are
found by their replica identity, or, under REPLICA IDENTITY FULL, by the text of all values, for `=` is not identity
(numeric 1.0 and 1.00, boxes by area) and some types have none (json, xml, point). What the type's output function
writes, which format() calls, is identity: it is what the origin sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pmgsync.postgres.apply.target import LocalColumn, Target

OLD, NEW = 0, 1
"""The row that a parameter is taken from. Where no old row was sent, the new one stands in: its key is the old one."""

Source = tuple[int, int]


class Statement(NamedTuple):
    """A statement to be prepared.

    Attributes:
        body: the statement without its common table expressions.
        types: of the parameters.
        sources: where the parameters' values come from.
        tables: the common table expressions, b"" for none.
    """

    body: bytes
    types: tuple[bytes, ...]
    sources: tuple[Source, ...]
    tables: bytes = b""

    @property
    def sql(self) -> bytes:
        """The whole statement."""
        return b"WITH " + self.tables + b" " + self.body if self.tables else self.body


class Builder:
    """Collects the parameters of a statement on a target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.types: list[bytes] = []
        self.sources: list[Source] = []
        self._known: dict[tuple[Source, bytes], bytes] = {}

    def parameter(self, row: int, place: int, type_name: bytes | None = None) -> bytes:
        """Return the parameter of a value, as its column's type or another one."""
        type_name = type_name or self.target.column(place).type_name
        wanted = ((row, place), type_name)
        if wanted not in self._known:
            self.types.append(type_name)
            self.sources.append((row, place))
            self._known[wanted] = b"$%d" % len(self.types)
        return self._known[wanted]

    def build(self, body: bytes, tables: bytes = b"") -> Statement:
        """Return the statement of a body with the parameters collected."""
        return Statement(body, tuple(self.types), tuple(self.sources), tables)

    def find(self, nulls: frozenset[int]) -> bytes:
        """Return the condition that is true for the one row of a change.

        Args:
            nulls: the indexed places whose old value is NULL.
        """
        target = self.target
        if not target.full:
            if not target.key:
                raise ValueError("no key")
            return b" AND ".join(self._equal(place) for place in target.key)
        tests = []
        for place in target.indexed:
            column = target.columns[place]
            # Narrows the search to what an index finds; identity is decided by the texts.
            tests.append(
                column.name + b" IS NOT DISTINCT FROM NULL"
                if place in nulls
                else b"%s %s %s" % (column.name, column.equals or b"", self.parameter(OLD, place))
            )
        tests += [identical(c.name, self.parameter(OLD, place, b"text")) for place, c in target.columns.items()]
        where = b" WHERE " + b" AND ".join(tests) if tests else b""
        if target.partitioned:
            return b"(tableoid, ctid) IN (SELECT tableoid, ctid FROM %s%s LIMIT 1)" % (target.name, where)
        # Exact duplicates: one message is one row.
        return b"ctid = (SELECT ctid FROM ONLY %s%s LIMIT 1)" % (target.name, where)

    def _equal(self, place: int) -> bytes:
        column = self.target.column(place)
        if column.equals is None:
            return identical(column.name, self.parameter(OLD, place, b"text"))
        return b"%s %s %s" % (column.name, column.equals, self.parameter(OLD, place))


def output(expression: bytes) -> bytes:
    """Return the expression of a value's text as its type's output function writes it; NULL stays NULL.

    `IS NULL` would be true for a composite value of NULLs, `IS NOT DISTINCT FROM NULL` is not. A cast to text differs
    from the output function for character(n), boolean, "char" and inet.
    """
    return b"CASE WHEN %s IS NOT DISTINCT FROM NULL THEN NULL ELSE pg_catalog.format('%%s', %s) END" % (
        expression,
        expression,
    )


def identical(expression: bytes, text: bytes) -> bytes:
    """Return the condition that a value's text is exactly this; compared as bytes whatever the column's collation."""
    return b'(%s) COLLATE pg_catalog."C" IS NOT DISTINCT FROM %s' % (output(expression), text)


def names(columns: Iterable[LocalColumn]) -> bytes:
    """Return the columns as a list of names."""
    return b", ".join(column.name for column in columns)


def insert(target: Target) -> Statement:
    """Return the INSERT of a whole row."""
    builder = Builder(target)
    if not target.columns:
        return builder.build(b"INSERT INTO %s DEFAULT VALUES" % target.name)
    values = b", ".join(builder.parameter(NEW, place) for place in target.columns)
    columns = names(target.columns.values())
    return builder.build(
        b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE VALUES (%s)" % (target.name, columns, values)
    )  # fmt: skip


def upsert(target: Target) -> Statement:
    """Return the INSERT that makes an existing row of the same key equal."""
    plain = insert(target)
    if not target.arbiter:
        return plain
    key = names(target.column(place) for place in target.arbiter)
    changed = [
        column.name + b" = EXCLUDED." + column.name
        for place, column in target.columns.items()
        if place not in target.arbiter and column.identity != "a"
    ]
    action = b"UPDATE SET " + b", ".join(changed) if changed else b"NOTHING"
    return plain._replace(body=plain.body + b" ON CONFLICT (%s) DO %s" % (key, action))


def update(target: Target, written: Sequence[int], nulls: frozenset[int]) -> Statement:
    """Return the UPDATE of one row.

    Args:
        written: the places to set; unchanged out-of-line values are not among them.
        nulls: as in `Builder.find`.

    Raises:
        ValueError: when the table has no key.
    """
    builder = Builder(target)
    if any(target.columns[place].identity == "a" for place in written):
        return _replace(builder, frozenset(written), nulls)
    if not written:
        # Nothing of the change is kept here, yet the row has to be there.
        return builder.build(b"SELECT 1 FROM %s%s WHERE %s" % (target.only, target.name, builder.find(nulls)))
    sets = b", ".join(b"%s = %s" % (target.columns[place].name, builder.parameter(NEW, place)) for place in written)
    find = builder.find(nulls)
    return builder.build(b"UPDATE %s%s SET %s WHERE %s" % (target.only, target.name, sets, find))


def _replace(builder: Builder, written: frozenset[int], nulls: frozenset[int]) -> Statement:
    """A GENERATED ALWAYS identity can be inserted but not updated: the row is deleted and inserted, with the values
    that the change does not have taken from the deleted one."""
    target = builder.target
    columns = [(place, column) for place, column in target.columns.items()]
    values = [
        builder.parameter(NEW, place) if place in written else b"gone." + column.name for place, column in columns
    ]
    values += [b"gone." + column.name for column in target.rest]
    listed = names([*(column for _, column in columns), *target.rest])
    return builder.build(
        b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM gone" % (target.name, listed, b", ".join(values)),
        b"gone AS (DELETE FROM %s%s WHERE %s RETURNING *)" % (target.only, target.name, builder.find(nulls)),
    )


def delete(target: Target, nulls: frozenset[int]) -> Statement:
    """Return the DELETE of one row.

    Raises:
        ValueError: when the table has no key.
    """
    builder = Builder(target)
    return builder.build(b"DELETE FROM %s%s WHERE %s" % (target.only, target.name, builder.find(nulls)))


def checked(statement: Statement, otherwise: bytes) -> Statement:
    """Return a statement that calls a function unless it hits exactly one row."""
    returning = b"" if statement.body.startswith(b"SELECT") else b" RETURNING 1"
    hit = b"hit AS (%s%s)" % (statement.body, returning)
    return statement._replace(
        tables=statement.tables + b", " + hit if statement.tables else hit,
        body=b"SELECT %s FROM hit HAVING pg_catalog.count(*) <> 1" % otherwise,
    )
