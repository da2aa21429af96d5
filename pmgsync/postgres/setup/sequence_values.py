"""Sequences in the database: the master publishes their values, the others follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import psycopg2
import psycopg2.errors
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.ceilings import PREFIX, Ceilings, Name, Sequence, Value, pack_values
from pmgsync.core.profile import Policy, Profile
from pmgsync.postgres.catalog import as_bytes, as_text
from pmgsync.postgres.session import quote_ident, quote_literal

LOCK_MS = 50
"""Milliseconds that a sequence which is being altered is waited for; then it is left for the next time."""

# The owner's column and what the watch's view knows of its table; a sequence of an identity has deptype `i`.
_SEQUENCES = """
SELECT n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle, tn.nspname, t.relname, a.attname
FROM pg_catalog.pg_sequence AS s JOIN pg_catalog.pg_class AS c ON c.oid = s.seqrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_depend AS d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
      AND d.objsubid = 0 AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjsubid > 0
      AND d.deptype IN ('a', 'i')
LEFT JOIN pg_catalog.pg_class AS t ON t.oid = d.refobjid
LEFT JOIN pg_catalog.pg_namespace AS tn ON tn.oid = t.relnamespace
LEFT JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend AS e WHERE e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                  AND e.objid = c.oid AND e.deptype = 'e')
ORDER BY 1, 2
"""
AT_ONCE = 200
"""Sequences that are read by one query."""


def covered(profile: Profile, owner: tuple[str, str, str] | None) -> bool:
    """Return True when a sequence follows the master's: of a mirrored table's column that is not node-local, or, when
    the profile is about all tables, nobody's. Pure.

    Args:
        owner: schema, table and column, None when no column owns it.
    """
    if not profile.sequences:
        return False
    if owner is None:
        return profile.all_tables
    schema, table, column = owner
    rule = profile.rule_for(schema, table)
    return rule is not None and rule.policy is Policy.MIRROR and column not in rule.local_columns


def read_sequences(connection: Connection, profile: Profile) -> dict[Name, Sequence]:
    """Return the sequences that the others follow; those that are locked now are left out.

    Args:
        connection: in autocommit mode.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(_SEQUENCES)
        found = {}
        for schema, name, increment, low, high, cycle, *owner in cursor.fetchall():
            owned = None if owner[0] is None else (as_text(owner[0]), as_text(owner[1]), as_text(owner[2]))
            if covered(profile, owned):
                found[as_bytes(schema), as_bytes(name)] = (increment, low, high, cycle)
        cursor.execute(f"SET lock_timeout = {LOCK_MS}")
        names = list(found)
        last: dict[Name, tuple[int, bool]] = {}
        for at in range(0, len(names), AT_ONCE):
            last |= dict(_read(cursor, names[at : at + AT_ONCE]))
    sequences = {}
    for key, (increment, low, high, cycle) in found.items():
        if key in last:
            value, called = last[key]
            sequences[key] = Sequence(increment, low, high, cycle, value if called else value - increment)
    return sequences


def _read(cursor: Cursor, names: list[Name]) -> Iterator[tuple[Name, tuple[int, bool]]]:
    """Yield where sequences stand. A plain read takes the weakest lock there is: nobody waits for it but DROP."""
    query = b" UNION ALL ".join(
        b"SELECT %d, last_value, is_called FROM %s.%s" % (number, quote_ident(schema), quote_ident(name))
        for number, (schema, name) in enumerate(names)
    )
    try:
        cursor.execute(query)
    except (psycopg2.errors.LockNotAvailable, psycopg2.errors.UndefinedTable, psycopg2.errors.WrongObjectType):
        if len(names) > 1:
            half = len(names) // 2
            yield from _read(cursor, names[:half])
            yield from _read(cursor, names[half:])
        return
    for number, value, called in cursor.fetchall():
        yield names[number], (value, called)


def publish_sequences(connection: Connection, profile: Profile, ceilings: Ceilings) -> int:
    """Publish the ceilings that are due, in one message; return how many.

    Raises:
        psycopg2.Error: when the server does not answer; every ceiling is published again then.
    """
    try:
        values = ceilings.look(read_sequences(connection, profile))
        if values:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT pmgsync.emit(%s, %s::bytea)",
                    (PREFIX, psycopg2.Binary(pack_values(values))),
                )
    except psycopg2.Error:
        ceilings.forget()
        raise
    return len(values)


# Names that no sequence here has come back. pg_sequence_last_value is NULL before the first value.
_FOLLOW = b"""
WITH given (schema, name, value, exact) AS (VALUES %s),
here AS (
    SELECT g.*, s.*, pg_catalog.pg_sequence_last_value(c.oid) AS last
    FROM given AS g JOIN pg_catalog.pg_namespace AS n ON n.nspname = g.schema
    JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = g.name AND c.relkind = 'S'
    JOIN pg_catalog.pg_sequence AS s ON s.seqrelid = c.oid),
moved AS (
    SELECT pg_catalog.setval(h.seqrelid::pg_catalog.regclass, h.value) FROM here AS h
    WHERE h.value BETWEEN h.seqmin AND h.seqmax
      AND (h.exact OR h.last IS NULL OR (CASE WHEN h.seqincrement > 0 THEN h.value > h.last ELSE h.value < h.last END)))
SELECT g.schema, g.name FROM given AS g
WHERE (SELECT pg_catalog.count(*) FROM moved) >= 0
  AND NOT EXISTS (SELECT FROM here AS h WHERE h.schema = g.schema AND h.name = g.name)"""


def follow(cursor: Cursor, values: Iterable[Value]) -> list[str]:
    """Set sequences to the master's ceilings, and return the names of those that are not here.

    It is not undone with the transaction, which does no harm: a ceiling is ahead at any later time, too.

    Raises:
        psycopg2.Error: when the server refuses.
    """
    given = b", ".join(
        b"(%s::name, %s::name, %d::int8, %s)"
        % (quote_literal(value.schema), quote_literal(value.name), value.value, b"true" if value.exact else b"false")
        for value in values
    )
    if not given:
        return []
    cursor.execute(_FOLLOW % given)
    return [
        f"{as_bytes(schema).decode(errors='backslashreplace')}.{as_bytes(name).decode(errors='backslashreplace')}"
        for schema, name in cursor.fetchall()
    ]


_OWNED = """
SELECT n.nspname, c.relname, s.seqincrement > 0, tn.nspname, t.relname, a.attname
FROM pg_catalog.pg_sequence AS s JOIN pg_catalog.pg_class AS c ON c.oid = s.seqrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_depend AS d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
      AND d.objsubid = 0 AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjsubid > 0
      AND d.deptype IN ('a', 'i')
JOIN pg_catalog.pg_class AS t ON t.oid = d.refobjid JOIN pg_catalog.pg_namespace AS tn ON tn.oid = t.relnamespace
JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE c.relpersistence = 'p' AND NOT s.seqcycle AND a.atttypid IN (20, 21, 23)
"""


def pass_rows(connection: Connection, profile: Profile) -> list[str]:
    """Set sequences that own their values in a column behind every value that the column has; return their names.

    For a node that becomes master: it makes good whatever the master had used beyond the ceilings. Reads whole tables
    where no index helps.

    Raises:
        psycopg2.Error: when the server does not answer or refuses.
    """
    moved = []
    with connection.cursor() as cursor:
        cursor.execute(_OWNED)
        for schema, name, forward, table_schema, table, column in cursor.fetchall():
            if not covered(profile, (as_text(table_schema), as_text(table), as_text(column))):
                continue
            quoted = quote_ident(as_bytes(column))
            extreme = b"pg_catalog.max(%s)" % quoted if forward else b"pg_catalog.min(%s)" % quoted
            source = quote_ident(as_bytes(table_schema)) + b"." + quote_ident(as_bytes(table))
            own = quote_ident(as_bytes(schema)) + b"." + quote_ident(as_bytes(name))
            # max() and min() of one column are read from an index, when they stand alone.
            cursor.execute(b"SELECT (SELECT %s FROM %s)::int8, last_value, is_called FROM %s" % (extreme, source, own))
            for value, last, called in cursor.fetchall():
                if value is not None and (not called or (value > last if forward else value < last)):
                    follow(cursor, [Value(as_bytes(schema), as_bytes(name), value, False)])
                    moved.append(f"{as_text(schema)}.{as_text(name)}")
    return moved
