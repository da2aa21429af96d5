"""TRUNCATE of several tables: as one statement, reaching exactly as far as the message says."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.postgres.apply.plan import TruncateItem
from pmgsync.postgres.session import rows

_REFERENCES = b"""
SELECT confrelid::int8, conrelid::int8 FROM pg_catalog.pg_constraint
WHERE contype = 'f' AND conrelid <> confrelid AND confrelid IN (%s)"""

_SEQUENCES = b"""
SELECT d.objid::pg_catalog.regclass::text FROM pg_catalog.pg_depend AS d
JOIN pg_catalog.pg_class AS s ON s.oid = d.objid AND s.relkind = 'S'
WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid
  AND d.refobjid IN (%s) AND d.deptype IN ('a', 'i')"""


def beyond(tables: Iterable[int], references: Iterable[tuple[int, int]]) -> set[int]:
    """Return the tables that TRUNCATE would not empty without emptying one that is not listed. Pure.

    Args:
        tables: OIDs of the listed tables.
        references: (referenced, referencing) of each foreign key.
    """
    edges = list(references)
    kept = set(tables)
    while excluded := {table for table, by in edges if table in kept and by not in kept}:
        kept -= excluded
    return set(tables) - kept


def truncate(cursor: Cursor, item: TruncateItem) -> None:
    """Empty the tables. CASCADE is never used: the message lists what the origin's cascade has reached.

    Raises:
        psycopg2.Error: when the server refuses it.
    """
    targets = {target.oid: target for target in item.targets}
    statements: list[bytes] = []
    if targets:
        oids = b", ".join(b"%d" % oid for oid in targets)
        cursor.execute(_REFERENCES % oids)
        references = [(int(row[0] or b"0"), int(row[1] or b"0")) for row in rows(cursor)]
        # No trigger fires in replica role, so DELETE reaches no further either.
        emptied = beyond(targets, references)
        names = [t.only + t.name for oid, t in targets.items() if oid not in emptied]
        if names:
            restart = b" RESTART IDENTITY" if item.restart_identity else b""
            statements.append(b"TRUNCATE " + b", ".join(names) + restart)
        statements += [b"DELETE FROM %s%s" % (targets[oid].only, targets[oid].name) for oid in sorted(emptied)]
        if emptied and item.restart_identity:
            cursor.execute(_SEQUENCES % b", ".join(b"%d" % oid for oid in sorted(emptied)))
            statements += [b"ALTER SEQUENCE %s RESTART" % (row[0] or b"") for row in rows(cursor)]
    for target, condition in item.parts:
        statements.append(b"DELETE FROM %s%s WHERE %s" % (target.only, target.name, condition))
    if statements:
        cursor.execute(b";".join(statements))
