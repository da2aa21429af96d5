"""The catalog: what tables, keys and sequences a database has, read in one query each, as values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import psycopg2.extensions

from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.postgres.session import quote_ident


def as_text(name: bytes | str) -> str:
    """Return a name from the catalog as a profile writes it; bytes that are not UTF-8 match nothing but survive."""
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name


def as_bytes(name: bytes | str) -> bytes:
    """Return a name as the catalog has it."""
    return name.encode("utf-8", "surrogateescape") if isinstance(name, str) else bytes(name)


@dataclass(frozen=True, slots=True)
class Column:
    """A column: names its type as SQL writes it."""

    name: bytes
    type: bytes
    not_null: bool
    generated: bool
    identity: bytes
    collatable: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the database, partitions among them, roots not.

    Attributes:
        file_node: changes whenever the table is rewritten or truncated.
        persistence: `p`, or `u` for unlogged.
        identity: pg_class.relreplident.
        primary_key: columns of the primary key, also when it is deferrable.
        replica_key: columns by which updates and deletes find their row; () when there is no usable key.
    """

    oid: int
    schema: bytes
    name: bytes
    file_node: int
    persistence: bytes
    identity: bytes
    identity_index: bytes
    primary_key: tuple[bytes, ...]
    replica_key: tuple[bytes, ...]
    columns: tuple[Column, ...]

    @property
    def quoted(self) -> bytes:
        """Its name as SQL."""
        return quote_ident(self.schema) + b"." + quote_ident(self.name)

    @property
    def label(self) -> str:
        """Its name as messages write it."""
        return f"{as_text(self.schema)}.{as_text(self.name)}".encode("utf-8", "replace").decode()

    @property
    def usable(self) -> bool:
        """True when its updates and deletes can be published as it is."""
        return self.identity == b"f" or bool(self.replica_key)

    def copied(self, local: Collection[str] = ()) -> tuple[bytes, ...]:
        """Return the columns that a copy has: neither generated nor local ones."""
        return tuple(
            column.name for column in self.columns if not column.generated and as_text(column.name) not in local
        )

    @property
    def shape(self) -> tuple[object, ...]:
        """What must not change between a snapshot and reading from it."""
        return (self.oid, self.schema, self.name, self.file_node, self.columns)


# Aggregates are arrays of names; a name may hold any byte but zero, so they are taken apart by that of `name[]`'s text
# form no more than once: here, as bytea in hexadecimal, which has no quoting.
_TABLES = """
SELECT c.oid::bigint, n.nspname, c.relname, c.relfilenode::bigint, c.relpersistence, c.relreplident,
       coalesce((SELECT ic.relname FROM pg_index AS i JOIN pg_class AS ic ON ic.oid = i.indexrelid
                 WHERE i.indrelid = c.oid AND i.indisreplident), ''::name),
       (SELECT string_agg(encode(textsend(a.attname::text), 'hex'), ',' ORDER BY k.n)
        FROM pg_index AS i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n), pg_attribute AS a
        WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid AND a.attnum = k.attnum),
       (SELECT string_agg(encode(textsend(a.attname::text), 'hex'), ',' ORDER BY k.n)
        FROM pg_index AS i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n), pg_attribute AS a
        WHERE i.indrelid = c.oid AND i.indisvalid AND i.indislive AND i.indimmediate
          AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END
          AND a.attrelid = c.oid AND a.attnum = k.attnum),
       (SELECT string_agg(concat_ws(':', encode(textsend(a.attname::text), 'hex'),
                                    encode(textsend(format_type(a.atttypid, a.atttypmod)), 'hex'),
                                    a.attnotnull, a.attgenerated <> '', a.attidentity, a.attcollation <> 0),
                          ',' ORDER BY a.attnum)
        FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
  AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND d.deptype = 'e')
ORDER BY n.nspname, c.relname
"""


def list_tables(connection: psycopg2.extensions.connection) -> list[Table]:
    """Return the tables of the database, as the session's transaction sees them; those of extensions are left out.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(_TABLES)
        return [_table(row) for row in cursor.fetchall()]


def _table(row: tuple[object, ...]) -> Table:
    oid, schema, name, file_node, persistence, identity, index, primary, replica, columns = row
    assert isinstance(oid, int)
    assert isinstance(file_node, int)
    return Table(
        oid,
        _raw(schema),
        _raw(name),
        file_node,
        _raw(persistence),
        _raw(identity),
        _raw(index),
        _names(primary),
        _names(replica),
        tuple(map(_column, _raw(columns or b"").split(b",") if columns else ())),
    )


def _raw(value: object) -> bytes:
    assert isinstance(value, bytes | str)
    return as_bytes(value)


def _names(value: object) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(part.decode()) for part in _raw(value).split(b",")) if value else ()


def _column(text: bytes) -> Column:
    name, kind, not_null, generated, identity, collatable = text.decode().split(":")
    return Column(
        bytes.fromhex(name),
        bytes.fromhex(kind),
        not_null == "t",
        generated == "t",
        identity.encode(),
        collatable == "t",
    )


def synchronised(tables: Collection[Table], profile: Profile) -> list[tuple[Table, TableRule]]:
    """Return the tables whose changes travel, each with its rule: neither local nor unlogged ones."""
    found = []
    for table in tables:
        rule = profile.rule_for(as_text(table.schema), as_text(table.name))
        if rule is not None and rule.policy is not Policy.LOCAL and table.persistence == b"p":
            found.append((table, rule))
    return found


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence and, when a column's default or identity owns it, that column."""

    schema: bytes
    name: bytes
    owner: tuple[bytes, bytes, bytes] | None

    @property
    def quoted(self) -> bytes:
        """Its name as SQL."""
        return quote_ident(self.schema) + b"." + quote_ident(self.name)


_SEQUENCES = """
SELECT n.nspname, c.relname, tn.nspname, t.relname, a.attname
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
      AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
LEFT JOIN pg_class AS t ON t.oid = d.refobjid
LEFT JOIN pg_namespace AS tn ON tn.oid = t.relnamespace
LEFT JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE c.relkind = 'S' AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
ORDER BY n.nspname, c.relname
"""


def list_sequences(connection: psycopg2.extensions.connection) -> list[Sequence]:
    """Return the sequences of the database, as the session's transaction sees them."""
    with connection.cursor() as cursor:
        cursor.execute(_SEQUENCES)
        return [
            Sequence(_raw(row[0]), _raw(row[1]), None if row[2] is None else (_raw(row[2]), _raw(row[3]), _raw(row[4])))
            for row in cursor.fetchall()
        ]
