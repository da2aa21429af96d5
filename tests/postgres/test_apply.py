"""Applying to a real server what a real slot says: every table is the same afterwards, byte for byte of its text."""

# Longer than a module should be: one subject, and its tests share most of what they set up.
from __future__ import annotations

import pytest

from tests.harness.apply_pairs import MakePair

pytestmark = pytest.mark.cluster


TYPES = {
    "smallint": "'-32768' '0' '7'",
    "integer": "'1' '-1'",
    "bigint": "'9223372036854775807'",
    "numeric": "'1.0' '1.00' 'NaN' '-0.000' '1e30'",
    "numeric(9,2)": "'1.10'",
    "real": "'1.1' 'NaN' '-Infinity'",
    "double precision": "'0.1' '1e-300' '-0'",
    "money": "'12.34'",
    "text": "'' 'a''b\\c' E'\\t\\n\\r'",
    "varchar(9)": "'x '",
    "char(5)": "'a' ''",
    '"char"': "'x' ''",
    "name": "'n'",
    "bytea": "'\\x00ff5c27' ''",
    "timestamp": "'2020-02-29 12:34:56.789' '-infinity' '0044-03-15 BC'",
    "timestamptz": "'2020-01-01 00:00:00+14'",
    "date": "'2020-01-01' 'infinity'",
    "time": "'24:00'",
    "timetz": "'12:00+03:30'",
    "interval": "'1 mon -1 day 00:00:01.5' '-1 year'",
    "boolean": "'t' 'f'",
    "point": "'(1,2)'",
    "line": "'{1,2,3}'",
    "lseg": "'[(0,0),(1,1)]'",
    "box": "'(2,2),(0,0)' '(4,1),(0,0)'",
    "path": "'((0,0),(1,1))'",
    "polygon": "'((0,0),(1,1))'",
    "circle": "'<(0,0),1>'",
    "cidr": "'10.0.0.0/8'",
    "inet": "'10.0.0.1' '10.0.0.1/8'",
    "macaddr": "'08:00:2b:01:02:03'",
    "macaddr8": "'08:00:2b:01:02:03:04:05'",
    "bit(3)": "'101'",
    "varbit": "'1' ''",
    "tsvector": "'a:1 b:2'",
    "tsquery": "'a & b'",
    "uuid": "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
    "json": "'{\"a\": 1}' '{\"a\":1}'",
    "jsonb": "'{\"a\": 1.0}' 'null'",
    "jsonpath": "'$.a'",
    "pg_lsn": "'0/1'",
    "int[]": "'{1,NULL,3}' '{}' '[2:3]={1,2}'",
    "text[]": '\'{"a,b","NULL",NULL,""}\'',
    "int4range": "'[1,5)' 'empty'",
    "tstzrange": "'[2020-01-01,)'",
    "numrange": "'(1.0,1.00]'",
    "int4multirange": "'{[1,3),[5,7)}' '{}'",
    "mood": "'sad' 'so ''good'",
    "pair": "'(1,\"x y\")' '(,)'",
    "pair[]": "'{\"(1,a)\",NULL}'",
    "small": "'3'",
    "hstorelike": "'(a,b)'",
    "regclass": "'pg_class'",
    "oid": "'4294967295'",
    "xid8": "'7'",
}


TYPE_SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'so ''good');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE hstorelike AS (k name, v "char");
CREATE DOMAIN small AS int CHECK (VALUE < 10);
"""


def _type_rows() -> list[tuple[str, str]]:
    return [(name, part) for name, literals in TYPES.items() for part in _split(literals)]


def _split(literals: str) -> list[str]:
    parts, current, inside, at = [], "", False, 0
    while at < len(literals):
        char = literals[at]
        if char == "'" and inside and literals[at + 1 : at + 2] == "'":
            current += "''"
            at += 2
            continue
        inside ^= char == "'"
        if char == " " and not inside:
            parts.append(current)
            current = ""
        else:
            current += char
        at += 1
    return [*parts, current]


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_types(make_pair: MakePair, identity: str) -> None:
    """Every built-in family, inserted, updated and deleted, found by key or by all of its text."""
    names = list(TYPES)
    key = "PRIMARY KEY" if identity == "DEFAULT" else ""
    columns = ", ".join(f"c{number} {name.replace('mood', 'public.mood')}" for number, name in enumerate(names))
    pair = make_pair(
        f"{TYPE_SCHEMA}CREATE TABLE t (id int {key}, {columns}); ALTER TABLE t REPLICA IDENTITY {identity}"
    )
    script = []
    for number, (name, literal) in enumerate(_type_rows()):
        column = f"c{names.index(name)}"
        script += [f"INSERT INTO t (id, {column}) VALUES ({number}, {literal})"]
    pair.both(";".join(script))
    pair.both("UPDATE t SET id = id + 1000 WHERE id % 2 = 0")
    for number, name in enumerate(names):
        first = _split(TYPES[name])[0]
        pair.run(f"UPDATE t SET c{number} = {first} WHERE id % 3 = 0")
    pair.both("SELECT 1")
    pair.both("DELETE FROM t WHERE id % 4 <> 1")
    pair.both("DELETE FROM t")


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_unchanged_toast(make_pair: MakePair, identity: str) -> None:
    pair = make_pair(
        "CREATE TABLE t (id int PRIMARY KEY, n int, big text, big2 text);"
        "ALTER TABLE t ALTER big SET STORAGE EXTERNAL, ALTER big2 SET STORAGE EXTERNAL;"
        f"ALTER TABLE t REPLICA IDENTITY {identity}"
    )
    pair.both("INSERT INTO t SELECT g, 0, repeat(chr(65 + g), 9000), repeat('z', 5000) FROM generate_series(1, 20) g")
    pair.both("UPDATE t SET n = n + 1")
    pair.both("UPDATE t SET n = n + 1, big2 = 'short' WHERE id < 9")
    pair.both("UPDATE t SET id = id + 100 WHERE id < 5")
    pair.both("BEGIN; UPDATE t SET big = NULL WHERE id = 6; UPDATE t SET n = 9; DELETE FROM t WHERE id > 110; COMMIT")


def test_key_changes(make_pair: MakePair) -> None:
    """Swapped keys, a whole unique column shifted, a key that comes back."""
    pair = make_pair("CREATE TABLE t (id int PRIMARY KEY, u int UNIQUE, v text)")
    pair.both("INSERT INTO t SELECT g, g, 'v' || g FROM generate_series(1, 50) g")
    pair.both(
        "BEGIN; UPDATE t SET id = -1 WHERE id = 1; UPDATE t SET id = 1 WHERE id = 2; UPDATE t SET id = 2 WHERE id = -1;"
        "UPDATE t SET u = -u; UPDATE t SET u = -u + 1; COMMIT"
    )
    pair.both(
        "BEGIN; DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (3, 300, 'again'); DELETE FROM t WHERE id = 4; COMMIT"
    )
    pair.run("DO $$ BEGIN FOR i IN REVERSE 50..5 LOOP UPDATE t SET id = id + 1 WHERE id = i; END LOOP; END $$")
    pair.both("UPDATE t SET v = NULL WHERE id % 2 = 0")


def test_keyless_duplicates(make_pair: MakePair) -> None:
    """One message is one row among exact duplicates; NULLs, and an index that narrows the search."""
    for index in ("", "CREATE INDEX ON t (a, b);"):
        pair = make_pair(
            f"CREATE TABLE t (a int, b text, c numeric, d box); ALTER TABLE t REPLICA IDENTITY FULL;{index}"
        )
        pair.both(
            "INSERT INTO t SELECT g % 3, NULLIF('x' || g % 2, 'x0'), 1.0, '(2,2),(0,0)' FROM generate_series(1, 60) g"
        )
        pair.both(
            "INSERT INTO t VALUES (1, NULL, 1.00, '(4,1),(0,0)'), (NULL, NULL, NULL, NULL), (NULL, '', NULL, NULL)"
        )
        pair.both("DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE a = 1 LIMIT 5)")
        pair.both("UPDATE t SET c = 1.00 WHERE ctid IN (SELECT ctid FROM t WHERE a = 2 LIMIT 3)")
        pair.both("UPDATE t SET c = c + 1 WHERE c::text = '1.00'")
        pair.both("DELETE FROM t WHERE a IS NULL")
        pair.both("UPDATE t SET a = NULL, b = NULL WHERE a = 0")
        pair.both("DELETE FROM t")


def test_equal_is_not_identical(make_pair: MakePair) -> None:
    """Rows that `=` cannot tell apart, in an index and out of it."""
    pair = make_pair(
        "CREATE TABLE t (n numeric, j json, x char(3), p point, i inet); ALTER TABLE t REPLICA IDENTITY FULL;"
        "CREATE INDEX ON t (n)"
    )
    pair.both(
        "INSERT INTO t VALUES (1.0, '{\"a\":1}', 'a', '(0,0)', '10.0.0.1'), (1.00, '{\"a\": 1}', 'a', "
        "'(0,0)', '10.0.0.1/8'),"
        "(1, '{}', 'b', '(0,1)', NULL)"
    )
    pair.both("DELETE FROM t WHERE n::text = '1.00'")
    pair.both("UPDATE t SET p = '(5,5)' WHERE n::text = '1.0'")
    pair.both("UPDATE t SET n = 1.000 WHERE n::text = '1.0'")


def test_composite_of_nulls_is_not_null(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TYPE pair AS (a int, b int); CREATE TABLE t (p pair, n int); ALTER TABLE t REPLICA IDENTITY FULL"
    )
    pair.both("INSERT INTO t VALUES (NULL, 1), (ROW(NULL, NULL), 1), (ROW(1, NULL), 1)")
    pair.both("UPDATE t SET n = 2 WHERE p::text = '(,)'")
    pair.both("DELETE FROM t WHERE p::text IS NULL")


def test_generated_and_identity_columns(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TABLE g (id int PRIMARY KEY, a int, b int GENERATED ALWAYS AS (a * 2) STORED);"
        "CREATE TABLE k (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text);"
        "CREATE TABLE o (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, v text, big text);"
        "ALTER TABLE o ALTER big SET STORAGE EXTERNAL;"
        "CREATE TABLE f (n int GENERATED ALWAYS AS IDENTITY, d int GENERATED BY DEFAULT AS IDENTITY, v text);"
        "ALTER TABLE f REPLICA IDENTITY FULL"
    )
    pair.both(
        "INSERT INTO g (id, a) SELECT x, x FROM generate_series(1, 20) x; INSERT INTO g (id, a) VALUES (99, 1);"
        "INSERT INTO k (v) SELECT 'x' FROM generate_series(1, 20); INSERT INTO k (v) VALUES ('y');"
        "INSERT INTO k OVERRIDING SYSTEM VALUE VALUES (1000, 'z');"
        "INSERT INTO o (id, v, big) SELECT x, 'o', repeat('b', 9000) FROM generate_series(1, 12) x;"
        "INSERT INTO f (v) VALUES ('a'), ('b')"
    )
    pair.both("UPDATE g SET a = a + 1; UPDATE k SET v = v || '!'; UPDATE k SET id = DEFAULT WHERE id = 3")
    pair.both("UPDATE o SET v = 'changed'; UPDATE o SET n = DEFAULT WHERE id < 4; UPDATE o SET id = 100 WHERE id = 1")
    pair.both("UPDATE f SET v = v || 'x'; UPDATE f SET n = DEFAULT; UPDATE f SET d = 7")
    pair.both("DELETE FROM g WHERE b > 10; DELETE FROM k WHERE id > 10; DELETE FROM f")


def test_truncate(make_pair: MakePair) -> None:
    """Several tables, foreign keys that point beyond the list here, sequences that begin again, and no cascade."""
    schema = (
        "CREATE TABLE a (id serial PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY, a_id int REFERENCES a);"
        "CREATE TABLE c (id int PRIMARY KEY); CREATE TABLE d (id int)"
    )
    beyond = ";CREATE TABLE here (id int REFERENCES c); CREATE TABLE upon (id int REFERENCES a)"
    pair = make_pair(schema, target=schema + beyond)
    fill = (
        "INSERT INTO a SELECT FROM generate_series(1, 9); INSERT INTO b VALUES (1, 1), (2, 5); "
        "INSERT INTO c VALUES (1); INSERT INTO d VALUES (1), (1)"
    )
    pair.both(fill)
    pair.run("INSERT INTO here VALUES (1); INSERT INTO upon VALUES (2); SELECT setval('a_id_seq', 500)", on=pair.target)
    pair.both("TRUNCATE a, b, c, d RESTART IDENTITY")
    assert pair.run("SELECT count(*)::int FROM here UNION ALL SELECT count(*)::int FROM upon", on=pair.target) == [
        (1,),
        (1,),
    ]
    assert pair.run("SELECT nextval('a_id_seq')::int", on=pair.target) == [(1,)]
    pair.both("INSERT INTO a SELECT FROM generate_series(1, 9); INSERT INTO b VALUES (3, 3)")
    pair.both(
        "BEGIN; INSERT INTO d VALUES (5); TRUNCATE a CASCADE; INSERT INTO d VALUES (6); TRUNCATE d; "
        "INSERT INTO d VALUES (7); COMMIT"
    )


@pytest.mark.parametrize("full", [False, True])
def test_any_bytes(make_pair: MakePair, full: bool) -> None:
    """An SQL_ASCII database holds any bytes, in names too."""
    key = "" if full else "PRIMARY KEY"
    pair = make_pair(
        f"CREATE TABLE t (id int {key}, v text, w varchar(9))"
        + ("; ALTER TABLE t REPLICA IDENTITY FULL" if full else ""),
        options="ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
    )
    for start in range(1, 256, 60):
        values = b", ".join(
            b"(%d, '%s', '%s')" % (code, bytes([code]).replace(b"'", b"''") * 2, bytes([code]).replace(b"'", b"''"))
            for code in range(start, min(start + 60, 256))
        )
        pair.run(b"INSERT INTO t VALUES " + values)
    pair.both("SELECT 1")
    pair.run(b"UPDATE t SET v = v || '\xff\xfe' WHERE id > 100; DELETE FROM t WHERE w = '\xe4'")
    pair.both("UPDATE t SET id = id + 1000, w = v || w WHERE id < 200 AND id <> 92")


def test_odd_names(make_pair: MakePair) -> None:
    names = [
        '"a b"',
        '"quo""te"',
        '"apos\'trophe"',
        '"SELECT"',
        '"%s"',
        '"theirs."',
        '"back\\slash"',
        '"x;y"',
        '"$1"',
        '"gone.mine."',
    ]
    columns = ", ".join(f"{name} text" for name in names)
    schema = 'CREATE SCHEMA "S ""x"; '
    tables = ""
    for name in names:
        tables += f'CREATE TABLE "S ""x".{name} ({columns}, PRIMARY KEY ({names[0]}, {names[1]}));'
    pair = make_pair(schema + tables)
    for name in names:
        values = ", ".join("'v'" for _ in names)
        pair.run(f'INSERT INTO "S ""x".{name} VALUES ({values})')
        pair.run(f"UPDATE \"S \"\"x\".{name} SET {names[2]} = 'w', {names[0]} = 'k'")
    pair.both("SELECT 1")


def test_widths(make_pair: MakePair) -> None:
    """No column at all, one, and as many as a table can have."""
    columns = ", ".join(f"c{n} int" for n in range(1590))
    pair = make_pair(
        "CREATE TABLE none (); ALTER TABLE none REPLICA IDENTITY FULL; CREATE TABLE one (a text PRIMARY KEY);"
        f"CREATE TABLE wide ({columns}, PRIMARY KEY (c0)); CREATE TABLE wide_full (LIKE wide); "
        "ALTER TABLE wide_full REPLICA IDENTITY FULL"
    )
    values = ", ".join("1" for _ in range(1590))
    pair.both(
        "INSERT INTO none DEFAULT VALUES; INSERT INTO none DEFAULT VALUES; INSERT INTO one VALUES (''), "
        "('x'), ('\\N'), ('\\.')"
    )
    pair.both(f"INSERT INTO wide VALUES ({values}); INSERT INTO wide_full VALUES ({values}), ({values})")
    pair.both("UPDATE wide SET c1 = 5; UPDATE wide_full SET c7 = 5 WHERE ctid = '(0,1)'; UPDATE one SET a = a || 'y'")
    pair.both("DELETE FROM wide; DELETE FROM wide_full; DELETE FROM one")
    pair.run("DELETE FROM none WHERE ctid = '(0,1)'")
    pair.both("INSERT INTO one SELECT repeat(chr(92), g) FROM generate_series(1, 20) g")


def test_columns_that_differ(make_pair: MakePair) -> None:
    """A column missing here is dropped with one warning, one missing there takes its default."""
    pair = make_pair(
        "CREATE TABLE t (id int PRIMARY KEY, newer text, b int)",
        target="CREATE TABLE t (b int, extra text DEFAULT 'here', id int PRIMARY KEY)",
    )
    pair.run(
        "INSERT INTO t SELECT g, 'n', g FROM generate_series(1, 20) g; UPDATE t SET newer = 'm'; "
        "UPDATE t SET b = 0 WHERE id = 1"
    )
    applier = pair.apply()
    assert len(applier.stats.warnings) == 1
    assert pair.table("t", on=pair.target, columns="id, b") == pair.table("t", columns="id, b")
    assert pair.run("SELECT DISTINCT extra FROM t", on=pair.target) == [(b"here",)]
    pair.run("ALTER TABLE t ADD newer text", on=pair.target)
    pair.run("UPDATE t SET newer = 'o'")
    assert not pair.apply().stats.warnings
    assert pair.run("SELECT DISTINCT newer FROM t", on=pair.target) == [(b"o",)]


def test_key_follows_the_newest_description(make_pair: MakePair) -> None:
    """The replica identity changes between transactions, and in the middle of one."""
    pair = make_pair(
        "CREATE TABLE t (a int NOT NULL, b int NOT NULL, c text); CREATE UNIQUE INDEX ta ON t (a); "
        "CREATE UNIQUE INDEX tb ON t (b); ALTER TABLE t REPLICA IDENTITY USING INDEX ta"
    )
    pair.both(
        "INSERT INTO t SELECT g, g + 100, 'c' FROM generate_series(1, 20) g; UPDATE t SET b = b + 1000 WHERE a < 5"
    )
    pair.both(
        "BEGIN; UPDATE t SET c = 'd' WHERE a = 1; ALTER TABLE t REPLICA IDENTITY USING INDEX tb; "
        "UPDATE t SET a = 1001 WHERE a = 1;"
        "UPDATE t SET c = 'e' WHERE a = 2; ALTER TABLE t REPLICA IDENTITY FULL; "
        "UPDATE t SET b = 77 WHERE a = 3; DELETE FROM t WHERE a = 4; COMMIT"
    )
    pair.both("ALTER TABLE t REPLICA IDENTITY USING INDEX tb; UPDATE t SET a = -a; DELETE FROM t WHERE b = 77")


def test_renamed_and_made_anew(make_pair: MakePair) -> None:
    """Rows go to the table that has the name, as the messages say it; another table of that name is fetched anew."""
    pair = make_pair(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        target="CREATE TABLE t (id int PRIMARY KEY, v text, w int); CREATE TABLE old (id int PRIMARY KEY, v text)",
    )
    pair.run("INSERT INTO t VALUES (1, 'a')")
    pair.run(
        "BEGIN; INSERT INTO t VALUES (2, 'b'); ALTER TABLE t RENAME TO old; INSERT INTO old VALUES (3, 'c');"
        "CREATE TABLE t (id int PRIMARY KEY, w int); INSERT INTO t VALUES (4, 4); DROP TABLE old; COMMIT"
    )
    pair.apply()
    assert pair.table("t", on=pair.target) == [(b"(1,a,)",), (b"(2,b,)",)]
    assert pair.run("SELECT kind, name FROM pmgsync.stale_table", on=pair.target) == [(b"table", b"t")]
    assert pair.table("old", on=pair.target) == [(b"(3,c)",)]


def test_partitions_and_inheritance(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (100); "
        "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (100) TO (200);"
        "CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child () INHERITS (parent); "
        "ALTER TABLE child REPLICA IDENTITY FULL"
    )
    pair.both(
        "INSERT INTO p SELECT g, 'v' FROM generate_series(0, 150) g; INSERT INTO parent VALUES (1, 'p'); "
        "INSERT INTO child VALUES (1, 'c')"
    )
    pair.both(
        "UPDATE p SET id = id + 100 WHERE id < 10 AND id > 55; UPDATE p SET id = 199 WHERE id = 3; "
        "UPDATE parent SET v = 'x'"
    )
    pair.both("DELETE FROM ONLY parent; TRUNCATE p1; DELETE FROM p WHERE id = 120")


def test_partitioned_only_here(make_pair: MakePair) -> None:
    """A plain keyless table there, a partitioned one here: a row is found by table and place."""
    pair = make_pair(
        "CREATE TABLE t (id int, v text); ALTER TABLE t REPLICA IDENTITY FULL",
        target="CREATE TABLE t (id int, v text) PARTITION BY HASH (id); "
        "CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    )
    pair.both("INSERT INTO t SELECT g % 7, 'v' FROM generate_series(1, 30) g")
    pair.both("DELETE FROM t WHERE ctid < '(0,5)'; UPDATE t SET v = 'w' WHERE ctid < '(0,9)'; UPDATE t SET id = id + 1")
    pair.both("TRUNCATE t")


def test_local_triggers_do_not_fire(make_pair: MakePair) -> None:
    pair = make_pair(
        "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE r (id int REFERENCES t ON DELETE CASCADE, n int PRIMARY KEY)"
    )
    pair.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not here'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON t FOR EACH ROW "
        "EXECUTE FUNCTION refuse()",
        on=pair.target,
    )
    pair.both("INSERT INTO t VALUES (1), (2); INSERT INTO r VALUES (1, 1), (2, 2); DELETE FROM t WHERE id = 1")
