"""Every type, odd values, names and tables: snapshot and stream bring them to another node, byte for byte."""

# Longer than a module should be: a table of each type, what is written to it, and one test that compares them all.
from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.postgres.session import connect, quote_ident, quote_literal
from tests.harness.cluster import Cluster, Node
from tests.harness.database import Database
from tests.harness.type_values import (
    EXTENSIONS,
    ODD_NAMES,
    OWN_TYPES,
    OWN_VALUES,
    VALUES,
    WITH_MODIFIERS,
    WITHOUT_INPUT,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

KEY_BYTES = 1000
"""A value that is longer is left out of keys, an entry of an index is no longer than 2700 bytes."""
NO_ARRAY_OF = {b"odd.always", b"odd.three", b"int2vector", b"oidvector"}
"""Types of which ARRAY[] makes something else, or nothing with a NULL."""
BYPASSES = ("action=resync", "action=fetch", "action=repeat", "action=apply-failed")
WIDE = 1600
"""The most columns that a table of PostgreSQL can have."""

# What an own column may have for a type: base types, ranges and multiranges; of arrays those that look like base types.
BUILT_IN = """
SELECT format_type(t.oid, -1) FROM pg_type AS t
WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm', 'd', 'e')
  AND NOT EXISTS (SELECT FROM pg_type AS e WHERE e.typarray = t.oid)
ORDER BY 1
"""


class Typed(NamedTuple):
    """The tables of one type.

    Attributes:
        name: the type as SQL.
        values: literals of it.
        array: the name of its array type, None when it has none.
        sortable: a primary key can have it.
    """

    number: int
    name: bytes
    values: list[bytes]
    array: bytes | None
    sortable: bool

    def table(self, kind: str) -> bytes:
        """Return the name of one of its tables."""
        return b"types.%s_%d" % (kind.encode(), self.number)

    @property
    def columns(self) -> bytes:
        """The columns that hold its values."""
        return b"v %s%s" % (self.name, b"" if self.array is None else b", a %s" % self.array)

    @property
    def keyless(self) -> list[bytes]:
        """The names of its tables without a key."""
        return [self.table(kind) for kind in ("keyless", "indexed")[: 1 + self.sortable]]

    @property
    def keys(self) -> list[bytes]:
        """Values for a key."""
        return [value for value in self.values if len(value) < KEY_BYTES]


class Session:
    """A session on one node, in bytes."""

    def __init__(self, dsn: str) -> None:
        self.connection = connect(dsn, application_name="types")
        self.connection.autocommit = True
        self.cursor = self.connection.cursor()

    def run(self, statement: str | bytes) -> list[tuple[Any, ...]]:
        """Run SQL and return its rows."""
        text = statement.encode() if isinstance(statement, str) else statement
        try:
            self.cursor.execute(text)
        except Exception as error:
            error.add_note(f"in {text[:500]!r}")
            raise
        return self.cursor.fetchall() if self.cursor.description else []

    def together(self, statements: list[bytes]) -> None:
        """Run statements in one transaction."""
        self.run(b"BEGIN;" + b";".join(statements) + b";COMMIT")

    def tables(self) -> dict[bytes, bytes]:
        """Return every table with its columns, sorted by name, as SQL."""
        found = self.run("""
            SELECT format('%I.%I', n.nspname, c.relname),
                   coalesce(string_agg(quote_ident(a.attname), ', ' ORDER BY a.attname), '')
            FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
            LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'pmgsync')
            GROUP BY 1
        """)
        return dict(found)

    def content(self, table: bytes, columns: bytes) -> list[bytes]:
        """Return a table's rows in COPY text format, sorted: what the types' output functions write."""
        out = io.BytesIO()
        self.cursor.copy_expert(b"COPY (SELECT %s FROM ONLY %s) TO STDOUT" % (columns, table), out)
        return sorted(out.getvalue().split(b"\n")[:-1])

    def close(self) -> None:
        self.connection.close()


def _bytes(values: tuple[str | bytes, ...]) -> list[bytes]:
    return [value.encode() if isinstance(value, str) else value for value in values]


def _typed(session: Session, values: dict[str, tuple[str | bytes, ...]], first: int) -> list[Typed]:
    found = []
    for number, (name, texts) in enumerate(values.items(), first):
        plain = name.partition(" COLLATE ")[0]
        ((array,),) = session.run(
            b"SELECT CASE WHEN t.typarray <> 0 THEN format_type(t.typarray, -1) END "
            b"FROM pg_type AS t WHERE t.oid = %s::regtype" % quote_literal(plain.encode())
        )
        sortable = True
        try:
            session.run(b"CREATE TABLE types.keyed_%d (n int, v %s, PRIMARY KEY (v, n))" % (number, name.encode()))
        except psycopg2.errors.UndefinedObject:
            sortable = False
        found.append(Typed(number, name.encode(), _bytes(texts), array, sortable))
    return found


def make_types(session: Session) -> tuple[list[Typed], list[str]]:
    """Make every type; returns them with their values, and in words what this server does not have."""
    without: list[str] = []
    session.run("CREATE SCHEMA odd; CREATE SCHEMA ext; CREATE SCHEMA types")
    session.run(OWN_TYPES)
    session.run('CREATE SCHEMA "sche.ma ""%"; CREATE TABLE odd."nam.e ""%" (); CREATE TABLE odd.cursed ()')
    built_in = [name.decode() for (name,) in session.run(BUILT_IN)]
    unknown = set(built_in) - set(VALUES) - WITHOUT_INPUT
    assert not unknown, f"types of this PostgreSQL that the test has no values for: {sorted(unknown)}"
    assert len(built_in) > 80
    every: dict[str, tuple[str | bytes, ...]] = {name: VALUES.get(name, ()) for name in built_in}
    every |= WITH_MODIFIERS | OWN_VALUES
    every |= {
        "odd.inner_pair[]": ('{"(1,a)",NULL,"(,)"}',),
        "odd.three[]": ('{"{1,2,3}"}',),
        "odd.mood[]": ("{sad,NULL}",),
    }
    available = {name.decode() for (name,) in session.run("SELECT name FROM pg_available_extensions")}
    for extension, types in EXTENSIONS.items():
        if extension in available:
            session.run(f"CREATE EXTENSION {extension} SCHEMA ext")
            every |= types
        else:
            without.append(f"the extension {extension}")
    try:
        session.run("SELECT '<a/>'::xml")
    except psycopg2.errors.FeatureNotSupported:
        every["xml"] = ()
        without.append("values of xml")
    return _typed(session, every, 1), without


def make_typed_tables(session: Session, types: list[Typed]) -> None:
    """Make the other tables of each type: with a key beside it, without any key, and without one but with an index."""
    for typed in types:
        session.run(b"CREATE TABLE %s (id int PRIMARY KEY, %s)" % (typed.table("beside"), typed.columns))
        session.run(b"CREATE TABLE %s (n int, %s)" % (typed.table("keyless"), typed.columns))
        if typed.sortable:
            session.run(b"CREATE TABLE %s (n int, %s)" % (typed.table("indexed"), typed.columns))
            session.run(b"CREATE INDEX ON %s (v)" % typed.table("indexed"))


def typed_rows(typed: Typed, first: int) -> list[bytes]:
    """Return the statements that insert rows of a type's tables, one row each."""
    if not typed.values:
        return [b"INSERT INTO %s (id) VALUES (%d)" % (typed.table("beside"), first)]
    literals = [b"%s::%s" % (quote_literal(value), typed.name) for value in typed.values]
    if typed.name != b"odd.always":
        literals.append(b"NULL")
    rows = []
    for number, literal in enumerate(literals, first):
        row = literal
        if typed.array is not None:
            # Empty, with a NULL, of two dimensions, and with a lower bound other than 1.
            array: bytes = (
                b"'{}'",
                b"ARRAY[%s, NULL]" % literal,
                b"ARRAY[ARRAY[%s], ARRAY[NULL::%s]]" % (literal, typed.name),
                b"array_fill(%s, ARRAY[2], ARRAY[-1])" % literal,
            )[number % 4]
            plain = literal != b"NULL" and typed.name not in NO_ARRAY_OF
            row += b", " + (array if plain else b"NULL")
        rows.append(b"INSERT INTO %s VALUES (%d, %s)" % (typed.table("beside"), number, row))
        # Two of the same: a change to one of them is no change to the other.
        rows += [b"INSERT INTO %s VALUES (%d, %s)" % (table, number, row) for table in typed.keyless * 2]
    if typed.sortable:
        rows += [
            b"INSERT INTO %s VALUES (%d, %s::%s)" % (typed.table("keyed"), number, quote_literal(value), typed.name)
            for number, value in enumerate(typed.keys, first)
        ]
    return rows


def typed_updates(typed: Typed) -> list[bytes]:
    """Return statements that give every row the values of another, and some another key."""
    array = b"" if typed.array is None else b", a = q.a"
    beside, keyed = typed.table("beside"), typed.table("keyed")
    statements = [
        b"UPDATE %s AS p SET v = q.v%s FROM %s AS q WHERE q.id = p.id - p.id %% 2 + (p.id + 1) %% 2"
        % (beside, array, beside),
        b"UPDATE %s SET id = id + 100000 WHERE id %% 3 = 0" % beside,
    ]
    for keyless in typed.keyless:
        statements += [
            b"UPDATE %s AS p SET v = q.v%s FROM %s AS q WHERE q.n = p.n + 1 AND p.ctid = "
            b"(SELECT min(m.ctid) FROM %s AS m WHERE m.n = p.n)" % (keyless, array, keyless, keyless),
            b"UPDATE %s SET n = -n WHERE n %% 3 = 0" % keyless,
        ]
    if typed.sortable:
        statements += [
            b"UPDATE %s AS p SET v = q.v, n = p.n + 100000 FROM %s AS q WHERE q.n = p.n + 1 AND p.n %% 2 = 0"
            % (keyed, keyed),
            b"UPDATE %s SET n = n + 200000 WHERE n %% 2 = 1" % keyed,
        ]
    return statements


def typed_deletes(typed: Typed) -> list[bytes]:
    """Return statements that delete some of a type's rows, one of two that are the same among them."""
    statements = [b"DELETE FROM %s WHERE id %% 2 = 0" % typed.table("beside")]
    statements += [
        b"DELETE FROM %s AS p WHERE p.ctid = (SELECT min(m.ctid) FROM %s AS m WHERE m.n = p.n)" % (table, table)
        for table in typed.keyless
    ]
    return [*statements, b"DELETE FROM %s WHERE n %% 4 < 2" % typed.table("keyed")] if typed.sortable else statements


def make_named_tables(session: Session) -> None:
    """Make tables of odd names, with columns of odd names, in schemas of odd names."""
    for name in ODD_NAMES:
        quoted = quote_ident(name)
        session.run(b"CREATE SCHEMA %s" % quoted)
        session.run(b"CREATE TABLE %s.%s (%s text PRIMARY KEY, other int)" % (quoted, quoted, quoted))
        session.run(b"CREATE TABLE %s.keyless (%s text, other int)" % (quoted, quoted))
    columns = b", ".join(b"%s text" % quote_ident(name) for name in ODD_NAMES)
    session.run(b"CREATE TABLE odd.names (id int PRIMARY KEY, %s)" % columns)


def named_changes(stage: str) -> list[bytes]:
    """Return what is done to them."""
    statements = []
    for name in ODD_NAMES:
        quoted = quote_ident(name)
        for table in (b"%s.%s" % (quoted, quoted), b"%s.keyless" % quoted):
            literal = quote_literal(name)
            statements += {
                "snapshot": [b"INSERT INTO %s VALUES (%s, 1), ('', 2), ('x', 3)" % (table, literal)],
                "insert": [b"INSERT INTO %s VALUES (%s || 'more', 1)" % (table, literal)],
                "update": [
                    b"UPDATE %s SET other = other + 10" % table,
                    b"UPDATE %s SET %s = %s || 'changed' WHERE other = 11" % (table, quoted, quoted),
                ],
                "delete": [b"DELETE FROM %s WHERE %s <> 'x'" % (table, quoted)],
            }[stage]
    values = b", ".join(quote_literal(name) for name in ODD_NAMES)
    first, last = quote_ident(ODD_NAMES[0]), quote_ident(ODD_NAMES[-1])
    statements += {
        "snapshot": [b"INSERT INTO odd.names VALUES (1, %s), (2, %s)" % (values, values)],
        "insert": [b"INSERT INTO odd.names VALUES (%d, %s)" % (n, values) for n in (3, 4)],
        "update": [b"UPDATE odd.names SET %s = %s || %s, id = id * 10 WHERE id < 4" % (last, first, last)],
        "delete": [b"DELETE FROM odd.names WHERE id = 20"],
    }[stage]
    return statements


WIDE_COLUMNS = ", ".join(f"c{number} smallint" for number in range(2, WIDE + 1))
SHAPES = f"""
CREATE TABLE odd.wide (c1 int PRIMARY KEY, {WIDE_COLUMNS});
CREATE TABLE odd.wide_keyless (c1 int, {WIDE_COLUMNS});
CREATE TABLE odd.nothing ();
CREATE TABLE odd.only_generated (g int GENERATED ALWAYS AS (42) STORED);
CREATE TABLE odd.generated (id int PRIMARY KEY, g text GENERATED ALWAYS AS ('\\N' || id) STORED, v text);
CREATE TABLE odd.generated_keyless (g int GENERATED ALWAYS AS (v * 2) STORED, v int);
CREATE TABLE odd.generated_key (id int, k int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY, v text);
CREATE TABLE odd.generated_part (a int, k int GENERATED ALWAYS AS (a % 3) STORED, b int, v text, PRIMARY KEY (b, k));
CREATE TABLE odd.generated_index (a int NOT NULL, k int GENERATED ALWAYS AS (-a) STORED NOT NULL, v text);
CREATE UNIQUE INDEX generated_index_k ON odd.generated_index (k);
ALTER TABLE odd.generated_index REPLICA IDENTITY USING INDEX generated_index_k;
CREATE TABLE odd.always_key (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);
CREATE TABLE odd.always_beside (k text PRIMARY KEY, id int GENERATED ALWAYS AS IDENTITY, v text);
CREATE TABLE odd.always_keyless (id int GENERATED ALWAYS AS IDENTITY, v text);
CREATE TABLE odd.by_default (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text);
CREATE TABLE odd.dropped (a int, id int PRIMARY KEY, b int, v text);
ALTER TABLE odd.dropped DROP COLUMN a, DROP COLUMN b;
CREATE TABLE odd.added (id int PRIMARY KEY);
INSERT INTO odd.added SELECT generate_series(1, 20);
ALTER TABLE odd.added ADD COLUMN v text DEFAULT '\\N', ADD COLUMN w int;
CREATE TABLE odd.toast (id int PRIMARY KEY, small int, big text, bytes bytea, pairs odd.outer_pair, list text[]);
ALTER TABLE odd.toast ALTER big SET STORAGE EXTERNAL, ALTER bytes SET STORAGE EXTERNAL;
CREATE TABLE odd.toast_keyless (small int, big text, bytes bytea);
ALTER TABLE odd.toast_keyless ALTER big SET STORAGE EXTERNAL;
CREATE TABLE odd.toast_key (big text, small int, PRIMARY KEY (big, small));
CREATE TABLE odd.by_types (u uuid, b bytea, c "char", n name, f double precision, a numeric[], r int4range, j jsonb,
    m odd.mood, p odd.inner_pair, d odd.small_positive, i interval, bits bit varying, v text,
    PRIMARY KEY (u, b, c, n, f, a, r, j, m, p, d, i, bits));
CREATE TABLE odd.by_index (v text, k numeric NOT NULL, l timestamptz NOT NULL);
CREATE UNIQUE INDEX by_index_lk ON odd.by_index (l, k);
ALTER TABLE odd.by_index REPLICA IDENTITY USING INDEX by_index_lk;
CREATE TABLE odd.include (a int, b int, v text, PRIMARY KEY (a) INCLUDE (b));
CREATE TABLE odd.nullable (a int, b text, UNIQUE (a, b));
CREATE TABLE odd.root (id int, k text, v text, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
CREATE TABLE odd.leaf_n PARTITION OF odd.root FOR VALUES IN ('\\N', 'NULL');
CREATE TABLE odd.leaf_rest PARTITION OF odd.root DEFAULT;
CREATE TABLE odd.parent (id int PRIMARY KEY, v text);
CREATE TABLE odd.child (w int) INHERITS (odd.parent);
"""


def shape_rows(first: int) -> list[bytes]:
    """Return statements that insert rows of odd tables."""
    wide = ", ".join(f"CASE WHEN g % 3 = 0 THEN NULL ELSE {number} END" for number in range(2, WIDE + 1))
    rows = f"generate_series({first}, {first + 9}) AS g"
    big = "(SELECT string_agg(md5(g::text || i::text), '') FROM generate_series(1, 2000) AS i)"
    octets = f"convert_to({big}, 'SQL_ASCII')"
    pairs = f"ROW(ROW(g, {big})::odd.inner_pair, ARRAY[ROW(NULL, {big})::odd.inner_pair], 1)::odd.outer_pair"
    key = (
        "md5(g::text)::uuid, decode('00ff' || lpad(to_hex(g), 8, '0'), 'hex'), '\\200', 'n''' || g, 'NaN', "
        "ARRAY[g, NULL, 'NaN'::numeric], int4range(g, NULL), jsonb_build_object('\\N', g), '\\N', "
        "ROW(g, NULL)::odd.inner_pair, 1 + g % 99, make_interval(secs => g), (g % 8)::bit(3)::bit varying"
    )
    return [
        text.encode()
        for text in (
            f"INSERT INTO odd.wide SELECT g, {wide} FROM {rows}",
            f"INSERT INTO odd.wide_keyless SELECT g, {wide} FROM {rows}, generate_series(1, 2)",
            *["INSERT INTO odd.nothing DEFAULT VALUES"] * 10,
            *["INSERT INTO odd.only_generated DEFAULT VALUES"] * 10,
            f"INSERT INTO odd.generated (id, v) SELECT g, '\\N' FROM {rows}",
            f"INSERT INTO odd.generated_keyless (v) SELECT g % 5 FROM {rows}",
            f"INSERT INTO odd.generated_key (id, v) SELECT g, 'v' FROM {rows}",
            f"INSERT INTO odd.generated_part (a, b, v) SELECT g, g / 3, 'v' FROM {rows}",
            f"INSERT INTO odd.generated_index (a, v) SELECT g, 'v' FROM {rows}",
            f"INSERT INTO odd.always_key (v) SELECT 'v' || g FROM {rows}",
            f"INSERT INTO odd.always_beside (k, v) SELECT 'k' || g, NULL FROM {rows}",
            f"INSERT INTO odd.always_keyless (v) SELECT 'v' || g FROM {rows}",
            f"INSERT INTO odd.by_default (v) SELECT 'v' || g FROM {rows}",
            f"INSERT INTO odd.dropped SELECT g, 'v' FROM {rows}",
            f"INSERT INTO odd.added (id) SELECT g + 100 FROM {rows}",
            f"INSERT INTO odd.toast SELECT g, 0, {big}, {octets}, {pairs}, ARRAY[{big}, NULL] FROM {rows}",
            f"INSERT INTO odd.toast_keyless SELECT g, {big}, {octets} FROM {rows}",
            f"INSERT INTO odd.toast_key SELECT repeat(md5(g::text), 80), 0 FROM {rows}",
            f"INSERT INTO odd.by_types SELECT {key}, 'v' FROM {rows}",
            f"INSERT INTO odd.by_index SELECT 'v', (g || '.00')::numeric, 'infinity' FROM {rows}",
            f"INSERT INTO odd.include SELECT g, g, 'v' FROM {rows}",
            "INSERT INTO odd.nullable VALUES (NULL, NULL), (NULL, NULL), (NULL, ''), (NULL, 'NULL')",
            f"INSERT INTO odd.root SELECT g, (ARRAY['\\N', 'NULL', '', 'x'])[1 + g % 4], 'v' FROM {rows}",
            f"INSERT INTO odd.parent SELECT g, 'v' FROM {rows}",
            f"INSERT INTO odd.child SELECT g, 'v', 1 FROM {rows}",
        )
    ]


SHAPE_UPDATES = """
UPDATE odd.wide SET c2 = NULL, c1600 = c1 WHERE c1 % 2 = 0
UPDATE odd.wide SET c1 = c1 + 100000 WHERE c1 % 5 = 0
UPDATE odd.wide_keyless SET c1600 = -1 WHERE ctid IN (SELECT min(ctid) FROM odd.wide_keyless GROUP BY c1)
UPDATE odd.generated SET id = id + 100000 WHERE id % 2 = 0
UPDATE odd.generated SET v = 'changed' WHERE id % 3 = 0
UPDATE odd.generated_keyless SET v = v + 10 WHERE v % 2 = 0
UPDATE odd.generated_key SET v = 'w' WHERE id % 2 = 0
UPDATE odd.generated_key SET id = id + 100000 WHERE id % 3 = 0
UPDATE odd.generated_part SET v = a WHERE k = 1
UPDATE odd.generated_part SET a = a + 3 WHERE k = 2
UPDATE odd.generated_part SET a = a + 1, b = b + 100000 WHERE k = 0
UPDATE odd.generated_index SET v = 'w' WHERE a % 2 = 0
UPDATE odd.generated_index SET a = a + 100000, v = k WHERE a % 3 = 0
UPDATE odd.always_key SET v = NULL WHERE id % 2 = 0
UPDATE odd.always_beside SET id = DEFAULT, v = 'x' WHERE id % 2 = 0
UPDATE odd.always_beside SET k = k || 'x' WHERE id % 3 = 0
UPDATE odd.always_keyless SET v = 'y' WHERE id % 2 = 0
UPDATE odd.always_keyless SET id = DEFAULT WHERE id % 3 = 0
UPDATE odd.by_default SET id = id + 100000, v = NULL WHERE id % 2 = 0
UPDATE odd.dropped SET v = NULL, id = -id WHERE id % 2 = 0
UPDATE odd.added SET w = id WHERE id % 2 = 0
UPDATE odd.toast SET small = small + 1
UPDATE odd.toast SET id = id + 100000 WHERE id % 2 = 0
UPDATE odd.toast SET big = big || 'x' WHERE id % 3 = 0
UPDATE odd.toast SET list = NULL, bytes = '\\x00' WHERE id % 5 = 0
UPDATE odd.toast_keyless SET small = small + 1
UPDATE odd.toast_keyless SET big = NULL WHERE small % 3 = 0
UPDATE odd.toast_key SET small = small + 1
UPDATE odd.toast_key SET big = big || 'x' WHERE length(big) % 2 = 0
UPDATE odd.by_types SET v = NULL WHERE d % 2 = 0
UPDATE odd.by_types SET f = '-0', a = ARRAY[1.0, 1.00], r = 'empty', m = '' WHERE d % 3 = 0
UPDATE odd.by_types SET f = '0', a = ARRAY[1.00, 1.0], j = '1.0' WHERE d % 3 = 0
UPDATE odd.by_types SET j = '1.00' WHERE d % 3 = 0
UPDATE odd.by_index SET k = k * 1.000 WHERE k % 2 = 0
UPDATE odd.by_index SET l = '-infinity', v = NULL WHERE k % 3 = 0
UPDATE odd.include SET b = b + 1
UPDATE odd.include SET a = a + 100000 WHERE a % 2 = 0
UPDATE odd.nullable SET a = 1 WHERE ctid = (SELECT min(ctid) FROM odd.nullable)
UPDATE odd.root SET k = 'NULL' WHERE k = ''
UPDATE odd.root SET v = k WHERE k IN ('\\N', 'x')
UPDATE odd.parent SET v = 'y' WHERE id % 2 = 0
"""
SHAPE_DELETES = """
DELETE FROM odd.wide WHERE c1 % 2 = 0
DELETE FROM odd.wide_keyless WHERE ctid IN (SELECT min(ctid) FROM odd.wide_keyless GROUP BY c1)
DELETE FROM odd.nothing WHERE ctid IN (SELECT ctid FROM odd.nothing LIMIT 3)
DELETE FROM odd.only_generated WHERE ctid IN (SELECT ctid FROM odd.only_generated LIMIT 3)
DELETE FROM odd.generated WHERE id % 2 = 0
DELETE FROM odd.generated_keyless WHERE v % 2 = 0
DELETE FROM odd.generated_key WHERE id % 4 = 0
DELETE FROM odd.generated_part WHERE b % 2 = 0
DELETE FROM odd.generated_index WHERE a % 4 < 2
DELETE FROM odd.always_key WHERE id % 2 = 0
DELETE FROM odd.always_beside WHERE id % 2 = 0
DELETE FROM odd.always_keyless WHERE id % 2 = 0
DELETE FROM odd.by_default WHERE id % 2 = 0
DELETE FROM odd.dropped WHERE id < 0
DELETE FROM odd.added WHERE w IS NULL
DELETE FROM odd.toast WHERE id % 4 = 0
DELETE FROM odd.toast_keyless WHERE small % 2 = 0
DELETE FROM odd.toast_key WHERE length(big) % 2 = 1
DELETE FROM odd.by_types WHERE d % 3 = 0
DELETE FROM odd.by_index WHERE k % 3 = 0
DELETE FROM odd.include WHERE a > 1000
DELETE FROM odd.nullable WHERE b IS NULL
DELETE FROM odd.root WHERE k = 'NULL'
DELETE FROM ONLY odd.parent WHERE id % 3 = 0
DELETE FROM odd.child WHERE id % 3 = 1
"""


def _lines(script: str) -> list[bytes]:
    return script.strip().encode().splitlines()


class Everything:
    """Both sessions and what was made."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.types: list[Typed] = []
        self.sessions: list[Session] = []

    def fill(self, node: Node) -> None:
        """Make all tables and their first rows."""
        session = Session(node.server.dsn(node.dbname))
        with contextlib.closing(session):
            self.types, _ = make_types(session)
            make_typed_tables(session, self.types)
            make_named_tables(session)
            session.run(SHAPES)
            for typed in self.types:
                session.together(typed_rows(typed, 1))
            session.together(named_changes("snapshot"))
            session.together(shape_rows(1))

    def connect(self) -> None:
        """Open a session on each node."""
        self.sessions = [Session(node.server.dsn(node.dbname)) for node in self.cluster.nodes]

    @property
    def master(self) -> Session:
        return self.sessions[0]

    def assert_equal(self, stage: str) -> tuple[int, int]:
        """Check that all tables are the same on both nodes; returns how many tables and rows were compared."""
        master, slave = self.sessions
        left_out = slave.run("SELECT schema || '.' || name, reason FROM pmgsync.stale_table")
        assert left_out == [], f"{stage}: {left_out}"
        # What the stream does not bring must not have been fetched; nothing needs a second attempt.
        log = self.cluster.nodes[1].log("agent").splitlines()
        assert [line for line in log if any(word in line for word in BYPASSES)] == []
        tables = master.tables()
        assert tables == slave.tables()
        different, rows = [], 0
        for table, columns in tables.items():
            here, there = master.content(table, columns), slave.content(table, columns)
            rows += len(here)
            if here != there:
                missing = [row for row in here if row not in there]
                more = [row for row in there if row not in here]
                different.append(
                    f"{table.decode(errors='backslashreplace')}: {len(here)} and {len(there)} rows; "
                    f"{[row[:200] for row in missing[:2]]} is {[row[:200] for row in more[:2]]}"
                )
        assert different == [], f"{stage}: {len(different)} tables differ\n" + "\n".join(different[:20])
        print(f"{stage}: {len(tables)} tables, {rows} rows")
        return len(tables), rows

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self.cluster.close()


@pytest.fixture
def everything(pg_bindir: str, tmp_path: Path) -> Iterator[Everything]:
    """A cluster of two whose master had all tables, with rows, before the other joined."""
    # No encoding: a text may hold any bytes.
    cluster = Cluster(tmp_path / "cluster", nodes=2, profile="mirror", encoding="SQL_ASCII")
    made = Everything(cluster)
    cluster.seed = made.fill
    with contextlib.closing(made):
        cluster.start()
        made.connect()
        yield made


@pytest.mark.campaign
def test_every_type_name_and_shape(everything: Everything) -> None:
    master, types = everything.master, everything.types
    values = sum(len(typed.values) for typed in types)
    print(f"{len(types)} types, {values} values, {sum(typed.sortable for typed in types)} of them as keys")
    tables, rows = everything.assert_equal("snapshot")
    assert tables > 3 * 80
    assert rows > 3 * values

    # Many rows of one table in a row are applied otherwise than one here and one there.
    for typed in types:
        master.together(sorted(typed_rows(typed, 1001), key=lambda text: text.split(b" VALUES")[0]))
    scattered = [typed_rows(typed, 2001) for typed in types]
    for place in range(max(map(len, scattered))):
        master.together([rows[place] for rows in scattered if place < len(rows)])
    master.together(named_changes("insert"))
    master.together(shape_rows(1001))
    everything.cluster.wait()
    everything.assert_equal("insert")

    for typed in types:
        master.together(typed_updates(typed))
    master.together(named_changes("update"))
    for statement in _lines(SHAPE_UPDATES):
        master.run(statement)
    everything.cluster.wait()
    everything.assert_equal("update")

    for typed in types:
        master.together(typed_deletes(typed))
    master.together(named_changes("delete"))
    for statement in _lines(SHAPE_DELETES):
        master.run(statement)
    everything.cluster.wait()
    _, rows = everything.assert_equal("delete")
    assert rows > values


def test_the_server_has_all_that_is_tested(server: EmbeddedPostgres) -> None:
    """Says what could not be tested here."""
    with contextlib.closing(Session(Database(server, encoding="SQL_ASCII").dsn)) as session:
        _, without = make_types(session)
    if without:
        pytest.skip(f"NOT TESTED, this PostgreSQL has not: {', '.join(without)}")
