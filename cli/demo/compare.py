"""Whether the copies are equal: every synchronised table of every node, by content."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmgsync.core.profile import Profile

_TABLES = (
    "SELECT n.nspname::text, c.relname::text, "
    "array_to_string(array_agg(a.attname::text ORDER BY a.attname), chr(10)) "
    "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
    "WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT LIKE 'pg\\_%' "
    "AND n.nspname NOT IN ('information_schema', 'pmgsync') GROUP BY 1, 2 ORDER BY 1, 2"
)


@dataclass(frozen=True, slots=True)
class Content:
    """A table's content: number of rows, and a hash over the text of all rows, whatever order they are stored in."""

    rows: int
    digest: str


def read_contents(dsn: str, profile: Profile) -> dict[str, Content]:
    """Return the content of each synchronised table, all as of one instant; node-local columns are left out."""
    from pmgsync.postgres.session import connect

    contents = {}
    with contextlib.closing(connect(dsn, application_name="pmgcm demo")) as connection, connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        cursor.execute(_TABLES)
        for row in cursor.fetchall():
            schema, table, columns = map(_text, row)
            kept = synchronised_columns(profile, schema, table, columns.split("\n"))
            if not kept:
                continue
            values = ", ".join(map(_quoted, kept))
            cursor.execute(
                "SELECT count(*), coalesce(md5(string_agg(hash, '' ORDER BY hash)), '') FROM "
                f"(SELECT md5(ROW({values})::text) AS hash FROM {_quoted(schema)}.{_quoted(table)}) rows"
            )
            ((count, digest),) = cursor.fetchall()
            contents[f"{schema}.{table}"] = Content(int(count), _text(digest))
    return contents


def synchronised_columns(profile: Profile, schema: str, table: str, columns: Sequence[str]) -> list[str]:
    """Return those of a table's columns that must be the same on all nodes; none when the table is not synchronised."""
    from pmgsync.core.profile import Policy

    rule = profile.rule_for(schema, table)
    if rule is None or rule.policy is Policy.LOCAL:
        return []
    return [column for column in columns if column not in rule.local_columns]


def differences(contents: Mapping[str, Mapping[str, Content]]) -> list[str]:
    """Return a sentence for each table that is not the same on all nodes; `contents` is by node, then by table."""
    found = []
    for table in sorted({table for tables in contents.values() for table in tables}):
        versions = {node: tables.get(table) for node, tables in contents.items()}
        if len(set(versions.values())) > 1:
            told = ", ".join(
                f"{node}: no table" if content is None else f"{node}: {content.rows} rows, {content.digest[:8]}"
                for node, content in versions.items()
            )
            found.append(f"{table} differs ({told})")
    return found


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
