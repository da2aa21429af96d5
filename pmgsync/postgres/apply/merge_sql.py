"""The SQL that merges rows into a table, whether they come one by one from a chain or all together from a snapshot.

`same_key` says when two rows have one key, `merged` what they become. Both are here and nowhere else, so that a row
becomes the same in whatever way it came. Pure; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pmgsync.core.merging import Sides, merge_expressions
from pmgsync.postgres.apply.statements import NEW, Builder, Statement, names, output
from pmgsync.postgres.apply.target import LocalColumn, Target
from pmgsync.postgres.session import quote_literal

_CHARACTER_OID = 1042

Places = dict[int, bytes]
"""Place of a column -> an expression."""


def column_text(column: LocalColumn, expression: bytes) -> bytes:
    """Return the expression of the text by which values of a column are compared with a rule's, and in a tie.

    It is what the type's output function writes: a cast to text differs for boolean and inet. The blanks at the end of
    a character(n) are not part of the value.
    """
    return b"pg_catalog.rtrim(%s)" % output(expression) if column.type_oid == _CHARACTER_OID else output(expression)


def same_key(target: Target, mine: bytes, theirs: bytes) -> bytes:
    """Return the condition that two rows have the same key; NULL is the same as NULL.

    Args:
        mine, theirs: what stands before a column's name: an alias and a dot.
    """
    tests = []
    for column in (target.columns[place] for place in target.key):
        left, right = mine + column.name, theirs + column.name
        if column.equals is not None:
            test = b"%s %s %s" % (left, column.equals, right)
        else:
            test = b'(%s) COLLATE pg_catalog."C" = (%s)' % (output(left), output(right))
        if not column.not_null:
            test = b"(%s OR %s IS NOT DISTINCT FROM NULL AND %s IS NOT DISTINCT FROM NULL)" % (test, left, right)
        tests.append(test)
    return b" AND ".join(tests)


def merged(target: Target, given: Sequence[int], mine: bytes, theirs: bytes) -> Places:
    """Return the merged values of the columns with a rule; the others keep the value that they have.

    Args:
        given: the places whose incoming values are known.
        mine, theirs: as in `same_key`.
    """
    place_of = {name_of(target, place): place for place in given if place not in target.key}
    columns = {name: target.columns[place] for name, place in place_of.items()}
    found = merge_expressions(
        target.rule.rules,
        {
            name: Sides(
                mine + c.name,
                theirs + c.name,
                column_text(c, mine + c.name),
                column_text(c, theirs + c.name),
                c.collatable,
            )
            for name, c in columns.items()
        },
    )
    return {place_of[name]: expression for name, expression in found.items()}


def name_of(target: Target, place: int) -> str:
    """Return a column's name as profiles write it."""
    return target.relation.columns[place].name.decode(errors="surrogateescape")


def merge_from(target: Target, source: bytes, given: Sequence[int], *, insertable: bytes = b"true") -> list[bytes]:
    """Return the statements that merge all rows of a table of the same column names; nothing is noted of them.

    Args:
        source: the table.
        given: the places of its columns.
        insertable: condition of the rows that may be inserted.
    """
    same = same_key(target, b"mine.", b"theirs.")
    found = merged(target, given, b"mine.", b"theirs.")
    columns = [target.columns[place] for place in given]
    statements = []
    if found:
        changed = b" OR ".join(
            b'(%s) COLLATE pg_catalog."C" IS DISTINCT FROM (%s)'
            % (output(b"mine." + target.columns[place].name), output(b"(%s)" % expression))
            for place, expression in found.items()
        )
        statements.append(
            b"UPDATE %s%s AS mine SET %s FROM %s AS theirs WHERE %s AND (%s)"
            % (target.only, target.name, _assignments(target, found), source, same, changed)
        )
    statements.append(
        b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM (SELECT * FROM %s WHERE %s) AS theirs "
        b"WHERE NOT EXISTS (SELECT FROM %s%s AS mine WHERE %s)"
        % (
            target.name, names(columns), b", ".join(b"theirs." + c.name for c in columns), source, insertable,
            target.only, target.name, same,
        )
    )  # fmt: skip
    return statements


def delete_others(target: Target, source: bytes, whose: bytes) -> bytes:
    """Return the statement that deletes the rows that a condition holds for and that a table does not have."""
    return b"DELETE FROM %s%s AS mine WHERE %s AND NOT EXISTS (SELECT FROM %s AS theirs WHERE %s)" % (
        target.only, target.name, whose, source, same_key(target, b"mine.", b"theirs."),
    )  # fmt: skip


def merge_row(
    target: Target, given: Sequence[int], *, may_insert: bool, origin: int, returns: bool = False
) -> Statement:
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
    builder = Builder(target)
    parameters = [builder.parameter(NEW, place) for place in given]
    columns = [target.columns[place] for place in given]
    # A unique index does not find a row by NULL.
    conflicting = may_insert and bool(target.arbiter) and all(target.columns[p].not_null for p in target.arbiter)
    found = merged(target, given, b"mine.", b"excluded." if conflicting else b"theirs.")
    assignments = _assignments(target, found)
    lost = _lost(builder, found)
    if conflicting:
        insert = b"INSERT INTO %s AS mine (%s) OVERRIDING SYSTEM VALUE VALUES (%s) ON CONFLICT (%s) DO %s" % (
            target.name,
            names(columns),
            b", ".join(parameters),
            names(target.columns[place] for place in target.arbiter),
            b"UPDATE SET " + assignments if assignments else b"NOTHING",
        )
        if not assignments:
            return builder.build(insert)
        came = b"mine.xmax = 0" if returns else b"false"
        hit = b"hit AS (%s RETURNING %s, %s AS came)" % (insert, lost, came)
        return builder.build(_noted(builder, found, origin, b"hit WHERE hit.came OR true = ANY (hit.lost)"), hit)
    same = same_key(target, b"mine.", b"theirs.")
    incoming = b", ".join(b"%s AS %s" % (value, c.name) for value, c in zip(parameters, columns, strict=True))
    change = (
        b"UPDATE %s%s AS mine SET %s FROM theirs WHERE %s RETURNING %s"
        % (target.only, target.name, assignments, same, lost)
        if assignments
        else b"SELECT '{}'::boolean[] AS lost FROM %s%s AS mine, theirs WHERE %s" % (target.only, target.name, same)
    )
    tables = b"theirs AS (SELECT %s), hit AS (%s)" % (incoming, change)
    if not may_insert:
        return builder.build(_noted(builder, found, origin, b"hit WHERE true = ANY (hit.lost)"), tables)
    came = b"'{}'::boolean[] AS lost, %s AS came" % (b"true" if returns else b"false")
    tables += (
        b", made AS (INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT * FROM theirs "
        b"WHERE NOT EXISTS (SELECT FROM hit) RETURNING %s)" % (target.name, names(columns), came)
    )
    both = b"(SELECT lost, false AS came FROM hit UNION ALL SELECT lost, came FROM made) AS hit"
    return builder.build(
        _noted(builder, found, origin, both + b" WHERE hit.came OR true = ANY (hit.lost)"), tables
    )  # fmt: skip


def _assignments(target: Target, found: Places) -> bytes:
    return b", ".join(b"%s = %s" % (target.columns[place].name, value) for place, value in found.items())


def _lost(builder: Builder, found: Places) -> bytes:
    """Return which of the columns that have a rule are another than they came."""
    target, tests = builder.target, []
    for place in _ruled(target, found):
        column, given = target.columns[place], builder.parameter(NEW, place)
        if target.rule.rules[name_of(target, place)].kind in {"greatest", "least"}:
            tests.append(b"mine.%s IS DISTINCT FROM %s" % (column.name, given))
        else:
            texts = output(b"mine." + column.name), output(given)
            tests.append(b'(%s) COLLATE pg_catalog."C" IS DISTINCT FROM %s' % texts)
    return b"ARRAY[%s]::boolean[] AS lost" % b", ".join(tests)


def _ruled(target: Target, found: Places) -> list[int]:
    return [place for place in found if name_of(target, place) in target.rule.rules]


def _noted(builder: Builder, found: Places, origin: int, rows: bytes) -> bytes:
    """Return the query that calls pmgsync.merged for rows of `hit`."""
    target, rules = builder.target, builder.target.rule.rules
    ruled = _ruled(target, found)

    def texts(values: Iterable[bytes]) -> bytes:
        return b"ARRAY[%s]::text[]" % b", ".join(values)

    return b"SELECT pmgsync.merged(%d, %d, %s, %s, %s::name[], %s, %s, %s, hit.lost, %s) FROM %s" % (
        target.number,
        origin,
        quote_literal(target.relation.namespace),
        quote_literal(target.relation.name),
        texts(quote_literal(target.relation.columns[place].name) for place in target.key),
        texts(output(builder.parameter(NEW, place)) for place in target.key),
        texts(quote_literal(target.relation.columns[place].name) for place in ruled),
        texts(quote_literal(rules[name_of(target, place)].kind.encode()) for place in ruled),
        texts(output(builder.parameter(NEW, place)) for place in ruled),
        rows,
    )
