"""Statements: the SQL of one row change on a target, with numbered parameters. Pure; nothing is executed here.

A statement's parameters are listed as (row, place): which of the two rows of a change, and which value of it. Rows are
found by their replica identity, or, under REPLICA IDENTITY FULL, by the text of all values, for `=` is not identity
(numeric 1.0 and 1.00, boxes by area) and some types have none (json, xml, point). What the type's output function
writes, which format() calls, is identity: it is what the origin sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pmgsync.core.merging import merge_expressions
from pmgsync.postgres.apply.target import LocalColumn, Target
from pmgsync.postgres.session import quote_literal

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


class _Builder:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.types: list[bytes] = []
        self.sources: list[Source] = []
        self._known: dict[tuple[Source, bytes], bytes] = {}

    def parameter(self, row: int, place: int, type_name: bytes | None = None) -> bytes:
        type_name = type_name or self.target.column(place).type_name
        wanted = ((row, place), type_name)
        if wanted not in self._known:
            self.types.append(type_name)
            self.sources.append((row, place))
            self._known[wanted] = b"$%d" % len(self.types)
        return self._known[wanted]

    def build(self, body: bytes, tables: bytes = b"") -> Statement:
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


def _names(columns: Iterable[LocalColumn]) -> bytes:
    return b", ".join(column.name for column in columns)


def insert(target: Target) -> Statement:
    """Return the INSERT of a whole row."""
    builder = _Builder(target)
    if not target.columns:
        return builder.build(b"INSERT INTO %s DEFAULT VALUES" % target.name)
    values = b", ".join(builder.parameter(NEW, place) for place in target.columns)
    columns = _names(target.columns.values())
    return builder.build(
        b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE VALUES (%s)" % (target.name, columns, values)
    )  # fmt: skip


def upsert(target: Target) -> Statement:
    """Return the INSERT that makes an existing row of the same key equal."""
    plain = insert(target)
    if not target.arbiter:
        return plain
    key = _names(target.column(place) for place in target.arbiter)
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
        nulls: as in `_Builder.find`.

    Raises:
        ValueError: when the table has no key.
    """
    builder = _Builder(target)
    if any(target.columns[place].identity == "a" for place in written):
        return _replace(builder, frozenset(written), nulls)
    if not written:
        # Nothing of the change is kept here, yet the row has to be there.
        return builder.build(b"SELECT 1 FROM %s%s WHERE %s" % (target.only, target.name, builder.find(nulls)))
    sets = b", ".join(b"%s = %s" % (target.columns[place].name, builder.parameter(NEW, place)) for place in written)
    find = builder.find(nulls)
    return builder.build(b"UPDATE %s%s SET %s WHERE %s" % (target.only, target.name, sets, find))


def _replace(builder: _Builder, written: frozenset[int], nulls: frozenset[int]) -> Statement:
    """A GENERATED ALWAYS identity can be inserted but not updated: the row is deleted and inserted, with the values
    that the change does not have taken from the deleted one."""
    target = builder.target
    columns = [(place, column) for place, column in target.columns.items()]
    values = [
        builder.parameter(NEW, place) if place in written else b"gone." + column.name for place, column in columns
    ]
    values += [b"gone." + column.name for column in target.rest]
    names = _names([*(column for _, column in columns), *target.rest])
    return builder.build(
        b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM gone" % (target.name, names, b", ".join(values)),
        b"gone AS (DELETE FROM %s%s WHERE %s RETURNING *)" % (target.only, target.name, builder.find(nulls)),
    )


def delete(target: Target, nulls: frozenset[int]) -> Statement:
    """Return the DELETE of one row.

    Raises:
        ValueError: when the table has no key.
    """
    builder = _Builder(target)
    return builder.build(b"DELETE FROM %s%s WHERE %s" % (target.only, target.name, builder.find(nulls)))


def checked(statement: Statement, otherwise: bytes) -> Statement:
    """Return a statement that calls a function unless it hits exactly one row."""
    returning = b"" if statement.body.startswith(b"SELECT") else b" RETURNING 1"
    hit = b"hit AS (%s%s)" % (statement.body, returning)
    return statement._replace(
        tables=statement.tables + b", " + hit if statement.tables else hit,
        body=b"SELECT %s FROM hit HAVING pg_catalog.count(*) <> 1" % otherwise,
    )


def merge(target: Target, given: Sequence[int], *, may_insert: bool, origin: int, returns: bool = False) -> Statement:
    """Return the statement that merges a new row into the local one of the same key.

    It calls pmgsync.merged for a row that is another afterwards than it came, and for nothing else.

    Args:
        origin: whose row it is, for the conflict log.
        returns: a row that is inserted was known on the origin before, so somebody may have deleted it meanwhile.
        given: the places whose values are known; all of them unless out-of-line values were not sent.
        may_insert: a row that is not here is inserted.

    Raises:
        ValueError: when the table has no key.
    """
    if not target.key:
        raise ValueError("no key")
    builder = _Builder(target)
    for place in given:
        builder.parameter(NEW, place)
    name_of = {place: target.relation.columns[place].name.decode(errors="surrogateescape") for place in given}
    columns = {name_of[place]: target.columns[place] for place in given}
    conflicting = bool(target.arbiter) and may_insert
    theirs = b"excluded." if conflicting else b"theirs."
    sets = merge_expressions(
        target.rule.rules,
        {
            name_of[place]: (b"mine." + c.name, theirs + c.name, c.collatable)
            for place, c in ((place, target.columns[place]) for place in given)
            if place not in target.key
        },
        output,
    )
    assignments = b", ".join(b"%s = %s" % (columns[name].name, value) for name, value in sets.items())
    names = _names(target.columns[place] for place in given)
    parameters = [builder.parameter(NEW, place) for place in given]
    place_of = {name: place for place, name in name_of.items()}
    lost = b", ".join(
        b"mine.%s IS DISTINCT FROM %s" % (columns[name].name, builder.parameter(NEW, place_of[name]))
        if target.rule.rules[name].kind in {"greatest", "least"}
        else b'(%s) COLLATE pg_catalog."C" IS DISTINCT FROM %s'
        % (output(b"mine." + columns[name].name), output(builder.parameter(NEW, place_of[name])))
        for name in sets
        if name in target.rule.rules
    )
    lost = b"ARRAY[%s]::boolean[] AS lost" % lost

    def noted(rows: bytes) -> bytes:
        return b"SELECT %s FROM %s" % (_merged(builder, list(sets), place_of, origin), rows)

    if conflicting:
        action = b"UPDATE SET " + assignments if assignments else b"NOTHING"
        insert = b"INSERT INTO %s AS mine (%s) OVERRIDING SYSTEM VALUE VALUES (%s) ON CONFLICT (%s) DO %s" % (
            target.name,
            names,
            b", ".join(parameters),
            _names(target.columns[place] for place in target.arbiter),
            action,
        )
        if not assignments:
            return builder.build(insert)
        came = b"mine.xmax = 0" if returns else b"false"
        hit = b"hit AS (%s RETURNING %s, %s AS came)" % (insert, lost, came)
        return builder.build(noted(b"hit WHERE hit.came OR true = ANY (hit.lost)"), hit)
    incoming = b", ".join(
        b"%s AS %s" % (value, target.columns[place].name) for value, place in zip(parameters, given, strict=True)
    )
    on = b" AND ".join(
        b"mine.%s %s theirs.%s" % (c.name, c.equals, c.name)
        if c.equals
        else b'(%s) COLLATE pg_catalog."C" = (%s)' % (output(b"mine." + c.name), output(b"theirs." + c.name))
        for c in (target.columns[place] for place in target.key)
    )
    change = (
        b"UPDATE %s%s AS mine SET %s FROM theirs WHERE %s RETURNING %s"
        % (target.only, target.name, assignments, on, lost)
        if assignments
        else b"SELECT '{}'::boolean[] AS lost FROM %s%s AS mine, theirs WHERE %s" % (target.only, target.name, on)
    )
    tables = b"theirs AS (SELECT %s), hit AS (%s)" % (incoming, change)
    if not may_insert:
        return builder.build(noted(b"hit WHERE true = ANY (hit.lost)"), tables)
    came = b"'{}'::boolean[] AS lost, %s AS came" % (b"true" if returns else b"false")
    tables += (
        b", made AS (INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT * FROM theirs "
        b"WHERE NOT EXISTS (SELECT FROM hit) RETURNING %s)" % (target.name, names, came)
    )
    both = b"(SELECT lost, false AS came FROM hit UNION ALL SELECT lost, came FROM made) AS hit"
    return builder.build(noted(both + b" WHERE hit.came OR true = ANY (hit.lost)"), tables)


def _merged(builder: _Builder, sets: Sequence[str], place_of: Mapping[str, int], origin: int) -> bytes:
    """Return the call of pmgsync.merged for a row of `hit`."""
    target, rules = builder.target, builder.target.rule.rules
    ruled = [name for name in sets if name in rules]

    def texts(values: Iterable[bytes]) -> bytes:
        return b"ARRAY[%s]::text[]" % b", ".join(values)

    return b"pmgsync.merged(%d, %d, %s, %s, %s::name[], %s, %s, %s, hit.lost, %s)" % (
        target.number,
        origin,
        quote_literal(target.relation.namespace),
        quote_literal(target.relation.name),
        texts(quote_literal(target.relation.columns[place].name) for place in target.key),
        texts(output(builder.parameter(NEW, place)) for place in target.key),
        texts(quote_literal(name.encode(errors="surrogateescape")) for name in ruled),
        texts(quote_literal(rules[name].kind.encode()) for name in ruled),
        texts(output(builder.parameter(NEW, place_of[name])) for name in ruled),
    )
