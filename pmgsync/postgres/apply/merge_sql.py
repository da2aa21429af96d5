"""The SQL that merges rows into a table, whether they come one by one or many from a chain, or all from a snapshot.

`same_key` says when two rows have one key, `merged` what they become. Both are here and nowhere else, so that a row
becomes the same in whatever way it came. Pure; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pmgsync.core.merging import Sides, merge_expressions
from pmgsync.postgres.apply.statements import NEW, Builder, Statement, names, output
from pmgsync.postgres.apply.target import LocalColumn, Target
from pmgsync.postgres.session import quote_ident, quote_literal

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
    came_as = {place: builder.parameter(NEW, place) for place in (*target.key, *_ruled(target, found))}
    lost = _lost(target, found, b"mine.", came_as) + b" AS lost"
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
        owed = b"hit WHERE hit.came OR true = ANY (hit.lost)"
        return builder.build(_noted(target, found, origin, came_as, owed), hit)
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
        return builder.build(_noted(target, found, origin, came_as, b"hit WHERE true = ANY (hit.lost)"), tables)
    came = b"'{}'::boolean[] AS lost, %s AS came" % (b"true" if returns else b"false")
    tables += (
        b", made AS (INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT * FROM theirs "
        b"WHERE NOT EXISTS (SELECT FROM hit) RETURNING %s)" % (target.name, names(columns), came)
    )
    both = b"(SELECT lost, false AS came FROM hit UNION ALL SELECT lost, came FROM made) AS hit"
    owed = both + b" WHERE hit.came OR true = ANY (hit.lost)"
    return builder.build(_noted(target, found, origin, came_as, owed), tables)


def merge_set(target: Target, *, origin: int, returns: bool) -> tuple[bytes, list[bytes]]:
    """Return the statement that merges many whole rows, each as `merge_row` does, and its parameters' types: an array
    for each column.

    No two rows may have one key. It fails when they have, where there is a unique index.

    Args:
        origin, returns: as in `merge_row`.
    """
    columns = list(target.columns.values())
    lost, came = (_free_name(target, word) for word in (b"lost", b"came"))
    arrays = b", ".join(b"$%d" % (number + 1) for number in range(len(columns)))
    rows = b"SELECT * FROM unnest(%s) AS given (%s)" % (arrays, names(columns))
    insert = b"INSERT INTO %s AS mine (%s) OVERRIDING SYSTEM VALUE SELECT * FROM theirs" % (
        target.name, names(columns),
    )  # fmt: skip
    found = merged(target, list(target.columns), b"mine.", b"excluded." if target.arbiter else b"theirs.")
    assignments = _assignments(target, found)
    theirs = {place: b"theirs." + column.name for place, column in target.columns.items()}
    losing = _lost(target, found, b"mine.", theirs)
    same = same_key(target, b"mine.", b"theirs.")
    if target.arbiter:
        insert += b" ON CONFLICT (%s) DO " % names(target.columns[place] for place in target.arbiter)
        insert += b"UPDATE SET " + assignments if assignments else b"NOTHING"
        tables = b"theirs AS (%s)" % rows
        seen = b", ".join(b"mine." + target.columns[place].name for place in (*target.key, *found))
        back = b"mine.xmax = 0" if returns else b"false"
        tables += b", mine AS (%s RETURNING %s, %s AS %s)" % (insert, seen, back, came)
        hit = b"SELECT theirs.*, %s AS %s, mine.%s FROM mine JOIN theirs ON %s" % (losing, lost, came, same)
    else:
        tables = b"theirs AS (%s), known AS (%s)" % (
            rows,
            b"UPDATE %s%s AS mine SET %s FROM theirs WHERE %s RETURNING theirs.*, %s AS %s"
            % (target.only, target.name, assignments, same, losing, lost)
            if assignments
            else b"SELECT theirs.*, '{}'::boolean[] AS %s FROM %s%s AS mine JOIN theirs ON %s"
            % (lost, target.only, target.name, same),
        )
        insert += b" WHERE NOT EXISTS (SELECT FROM known AS mine WHERE %s) RETURNING %s" % (same, names(columns))
        tables += b", made AS (%s)" % insert
        hit = b"SELECT *, false AS %s FROM known UNION ALL SELECT *, '{}'::boolean[], %s FROM made" % (
            came, b"true" if returns else b"false",
        )  # fmt: skip
    types = [column.type_name + b"[]" for column in columns]
    if target.arbiter and not assignments:
        return b"WITH theirs AS (%s) %s" % (rows, insert), types
    came_as = {place: b"hit." + column.name for place, column in target.columns.items()}
    owed = b"(%s) AS hit WHERE hit.%s OR true = ANY (hit.%s)" % (hit, came, lost)
    return b"WITH %s %s" % (tables, _noted(target, found, origin, came_as, owed, b"hit." + lost)), types


def _free_name(target: Target, word: bytes) -> bytes:
    """Return a name that no column has."""
    while quote_ident(word) in {column.name for column in target.columns.values()}:
        word += b"_"
    return word


def _assignments(target: Target, found: Places) -> bytes:
    return b", ".join(b"%s = %s" % (target.columns[place].name, value) for place, value in found.items())


def _lost(target: Target, found: Places, mine: bytes, came_as: Places) -> bytes:
    """Return which of the columns that have a rule are another than they came."""
    tests = []
    for place in _ruled(target, found):
        here, given = mine + target.columns[place].name, came_as[place]
        if target.rule.rules[name_of(target, place)].kind in {"greatest", "least"}:
            tests.append(b"%s IS DISTINCT FROM %s" % (here, given))
        else:
            tests.append(b'(%s) COLLATE pg_catalog."C" IS DISTINCT FROM %s' % (output(here), output(given)))
    return b"ARRAY[%s]::boolean[]" % b", ".join(tests)


def _ruled(target: Target, found: Places) -> list[int]:
    return [place for place in found if name_of(target, place) in target.rule.rules]


def _noted(
    target: Target, found: Places, origin: int, came_as: Places, rows: bytes, lost: bytes = b"hit.lost"
) -> bytes:
    """Return the query that calls pmgsync.merged for rows of `hit`."""
    rules = target.rule.rules
    ruled = _ruled(target, found)

    def texts(values: Iterable[bytes]) -> bytes:
        return b"ARRAY[%s]::text[]" % b", ".join(values)

    return b"SELECT pmgsync.merged(%d, %d, %s, %s, %s::name[], %s, %s, %s, %s, %s) FROM %s" % (
        target.number,
        origin,
        quote_literal(target.relation.namespace),
        quote_literal(target.relation.name),
        texts(quote_literal(target.relation.columns[place].name) for place in target.key),
        texts(output(came_as[place]) for place in target.key),
        texts(quote_literal(target.relation.columns[place].name) for place in ruled),
        texts(quote_literal(rules[name_of(target, place)].kind.encode()) for place in ruled),
        lost,
        texts(output(came_as[place]) for place in ruled),
        rows,
    )
