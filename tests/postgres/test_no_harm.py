# ruff: noqa: E501 -- a line is a transaction
"""No harm: the same statements on a database with pmgsync attached and on one without; results and errors are the same."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.provision import deprovision
from pmgsync.profile_file import load_profile
from tests.harness.database import Database

# Each line is sent by itself; a line of several statements is one transaction unless it says otherwise. "COPY ... <<" has
# its data behind it. Lines that fail are meant to: the error must be the same.
BEFORE = """
CREATE TABLE old_keyed (id int PRIMARY KEY, v text)
CREATE TABLE old_loose (v text)
CREATE TABLE old_deferrable (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)
CREATE TABLE old_root (id int, v text) PARTITION BY RANGE (id)
CREATE TABLE old_leaf PARTITION OF old_root FOR VALUES FROM (0) TO (100)
CREATE UNLOGGED TABLE old_unlogged (v text)
CREATE TABLE old_index (id int NOT NULL, v text)
CREATE UNIQUE INDEX old_index_id ON old_index (id)
ALTER TABLE old_index REPLICA IDENTITY USING INDEX old_index_id
CREATE ROLE somebody_{suffix}
GRANT ALL ON SCHEMA public TO somebody_{suffix}
INSERT INTO old_loose VALUES ('a'), ('a'), (NULL)
INSERT INTO old_index VALUES (1, 'a')
"""

SCRIPT = """
UPDATE old_loose SET v = 'b'
DELETE FROM old_loose WHERE v IS NULL
INSERT INTO old_deferrable VALUES (1), (2)
UPDATE old_deferrable SET id = 3 - id
INSERT INTO old_root VALUES (1, 'x')
UPDATE old_root SET v = 'y'
INSERT INTO old_unlogged VALUES ('x')
UPDATE old_unlogged SET v = 'y'
CREATE TABLE a (x int); INSERT INTO a VALUES (1), (1); UPDATE a SET x = x + 1; DELETE FROM a WHERE x = 2
CREATE TABLE a2 AS SELECT g AS x FROM generate_series(1, 10) AS g; UPDATE a2 SET x = -x; SELECT sum(x) FROM a2
SELECT 1 AS x INTO a3
UPDATE a3 SET x = 2
CREATE TABLE a4 (LIKE old_keyed); INSERT INTO a4 VALUES (1, 'x'); DELETE FROM a4
CREATE TABLE a5 (j json, p point, b box, x jsonpath); INSERT INTO a5 VALUES ('1', '(1,2)', '(1,2),(3,4)', '$.a')
UPDATE a5 SET j = '2', p = '(2,2)'
DELETE FROM a5
CREATE TABLE a6 ()
INSERT INTO a6 DEFAULT VALUES
DELETE FROM a6
CREATE TABLE a7 (id int GENERATED ALWAYS AS IDENTITY, double int GENERATED ALWAYS AS (3) STORED, v int)
INSERT INTO a7 (v) VALUES (1), (2)
UPDATE a7 SET v = 3
DELETE FROM a7 WHERE id = 1
CREATE TABLE a8 (id int, double int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY)
INSERT INTO a8 VALUES (1), (2)
UPDATE a8 SET id = id + 10
DELETE FROM a8 WHERE id = 11
CREATE TABLE b1 (id int PRIMARY KEY DEFERRABLE)
INSERT INTO b1 VALUES (1), (2)
UPDATE b1 SET id = id + 1
ALTER TABLE old_keyed DROP CONSTRAINT old_keyed_pkey
INSERT INTO old_keyed VALUES (1, 'x'); UPDATE old_keyed SET v = 'y'; DELETE FROM old_keyed
ALTER TABLE old_keyed ADD PRIMARY KEY (id)
UPDATE old_keyed SET v = 'z'
ALTER TABLE old_keyed DROP COLUMN id
UPDATE old_keyed SET v = 'z'
DROP INDEX old_index_id
UPDATE old_index SET v = 'b'
CREATE UNIQUE INDEX old_index_id ON old_index (id)
ALTER TABLE old_index REPLICA IDENTITY USING INDEX old_index_id
UPDATE old_index SET v = 'c'
DROP INDEX CONCURRENTLY old_index_id
UPDATE old_index SET v = 'd'
CREATE TABLE c1 (id int PRIMARY KEY); ALTER TABLE c1 REPLICA IDENTITY NOTHING; INSERT INTO c1 VALUES (1); UPDATE c1 SET id = 2
ALTER TABLE c1 REPLICA IDENTITY DEFAULT
UPDATE c1 SET id = 3
CREATE DOMAIN d AS int
CREATE TABLE c2 (id d PRIMARY KEY, v int)
INSERT INTO c2 VALUES (1, 1)
DROP DOMAIN d CASCADE
UPDATE c2 SET v = 2
CREATE TABLE c3 (id int PRIMARY KEY); INSERT INTO c3 VALUES (1); CREATE TABLE c4 (id int REFERENCES c3 ON DELETE CASCADE)
INSERT INTO c4 VALUES (1), (1)
DELETE FROM c3
SELECT count(*) FROM c4
TRUNCATE c3, c4
CREATE TABLE r (id int, k int, PRIMARY KEY (id, k)) PARTITION BY LIST (k)
CREATE TABLE r1 PARTITION OF r FOR VALUES IN (1)
CREATE TABLE r2 (id int NOT NULL, k int NOT NULL)
INSERT INTO r2 VALUES (1, 2); UPDATE r2 SET id = 2
ALTER TABLE r ATTACH PARTITION r2 FOR VALUES IN (2)
CREATE TABLE r3 PARTITION OF r FOR VALUES IN (3, 4) PARTITION BY LIST (k)
CREATE TABLE r3a PARTITION OF r3 FOR VALUES IN (3)
INSERT INTO r VALUES (1, 1), (1, 3)
UPDATE r SET id = id + 1
UPDATE r SET k = 1 WHERE k = 3
INSERT INTO r VALUES (1, 4)
ALTER TABLE r DROP CONSTRAINT r_pkey
UPDATE r SET id = 7
DELETE FROM r WHERE k = 2
ALTER TABLE r DETACH PARTITION r2
UPDATE r2 SET id = 9
ALTER TABLE r DETACH PARTITION r1 CONCURRENTLY
UPDATE r1 SET id = 9
CREATE TABLE i0 (id int); CREATE TABLE i1 (v int) INHERITS (i0); INSERT INTO i1 VALUES (1, 2); UPDATE i0 SET id = 3; DELETE FROM i0
CREATE TEMP TABLE t (x int); INSERT INTO t VALUES (1); UPDATE t SET x = 2
CREATE TEMP TABLE t2 ON COMMIT DROP AS SELECT 1 AS x; DELETE FROM t2
CREATE UNLOGGED TABLE u (x int); INSERT INTO u VALUES (1); UPDATE u SET x = 2
ALTER TABLE u SET LOGGED
UPDATE u SET x = 3
ALTER TABLE u SET UNLOGGED
UPDATE u SET x = 4
ALTER TABLE a SET UNLOGGED
UPDATE a SET x = 4
CREATE SCHEMA s CREATE TABLE in_s (x int) CREATE VIEW v AS SELECT * FROM in_s
INSERT INTO s.in_s VALUES (1); UPDATE s.in_s SET x = 2
CREATE SCHEMA s2
CREATE TABLE s2.t AS SELECT 1 AS x
DELETE FROM s2.t
ALTER TABLE s2.t SET SCHEMA s
ALTER SCHEMA s2 RENAME TO s3
CREATE TABLE s3.t (x int); INSERT INTO s3.t VALUES (1); DELETE FROM s3.t
DROP SCHEMA s3 CASCADE
CREATE TABLE f (x int); COPY f FROM STDIN (FREEZE) << 1
COPY f FROM STDIN << 2
UPDATE f SET x = 3
CREATE TABLE g (x int); SAVEPOINT s; ALTER TABLE g ADD PRIMARY KEY (x); ROLLBACK TO s; INSERT INTO g VALUES (1); UPDATE g SET x = 2
ALTER TABLE g RENAME TO g_old; CREATE TABLE g (x int, y int); INSERT INTO g SELECT x, x FROM g_old; DROP TABLE g_old; UPDATE g SET y = 1
ALTER TABLE g RENAME COLUMN y TO z; UPDATE g SET z = 2; ALTER TABLE g ALTER COLUMN z TYPE bigint; UPDATE g SET z = 3; ALTER TABLE g DROP COLUMN z; DELETE FROM g
DO $$ BEGIN FOR i IN 1..3 LOOP EXECUTE format('CREATE TABLE loop%s (x int)', i); EXECUTE format('INSERT INTO loop%s VALUES (1)', i); EXECUTE format('UPDATE loop%s SET x = 2', i); END LOOP; END $$
CREATE FUNCTION maker() RETURNS int LANGUAGE plpgsql AS $$ BEGIN CREATE TABLE made (x int); INSERT INTO made VALUES (1); UPDATE made SET x = 5; RETURN (SELECT x FROM made); END $$
SELECT maker()
SELECT maker()
BEGIN ISOLATION LEVEL SERIALIZABLE; CREATE TABLE ser (x int); INSERT INTO ser VALUES (1); UPDATE ser SET x = 2; COMMIT
BEGIN READ ONLY; CREATE TABLE never (x int)
CREATE TABLE a (x int)
CREATE TABLE IF NOT EXISTS a (x int)
CREATE TABLE broken (x nosuchtype)
UPDATE nosuchtable SET x = 1
INSERT INTO c1 VALUES (3)
ALTER TABLE c1 ADD PRIMARY KEY (id)
DROP TABLE nosuchtable
DROP TABLE IF EXISTS nosuchtable
CREATE MATERIALIZED VIEW m AS SELECT * FROM c1
REFRESH MATERIALIZED VIEW m
CREATE VIEW w AS SELECT * FROM a2; UPDATE w SET x = 0 WHERE x = -1
MERGE INTO a2 USING (VALUES (0)) AS n (x) ON a2.x = n.x WHEN MATCHED THEN UPDATE SET x = 100 WHEN NOT MATCHED THEN INSERT VALUES (1)
INSERT INTO c1 VALUES (3) ON CONFLICT (id) DO UPDATE SET id = 4 RETURNING id
CREATE TABLE "we""ird. näme" ("c.ol" int); INSERT INTO "we""ird. näme" VALUES (1); UPDATE "we""ird. näme" SET "c.ol" = 2
CREATE TYPE pair AS (a int, b text); CREATE TABLE typed OF pair; INSERT INTO typed VALUES (1, 'x'); UPDATE typed SET b = 'y'
ALTER TYPE pair ADD ATTRIBUTE c int CASCADE; UPDATE typed SET c = 1
CREATE TABLE serial (id serial, v text); INSERT INTO serial (v) VALUES ('a'); UPDATE serial SET v = 'b'; TRUNCATE serial RESTART IDENTITY
VACUUM FULL a2
CLUSTER c1 USING c1_pkey
REINDEX TABLE CONCURRENTLY c1
UPDATE c1 SET id = 8
CREATE EXTENSION hstore
CREATE TABLE hs (h hstore); INSERT INTO hs VALUES ('a=>1'); UPDATE hs SET h = h || 'b=>2'; SELECT h FROM hs
SET ROLE somebody_{suffix}; CREATE TABLE theirs (x int); INSERT INTO theirs VALUES (1); UPDATE theirs SET x = 2; ALTER TABLE theirs ADD PRIMARY KEY (x); ALTER TABLE theirs DROP CONSTRAINT theirs_pkey; DELETE FROM theirs
SET ROLE somebody_{suffix}; UPDATE old_loose SET v = 'c'
SET ROLE somebody_{suffix}; SELECT count(*) FROM nosuchtable
CREATE TABLE wait (x int); SET lock_timeout = '1ms'; ALTER TABLE wait ADD y int; UPDATE wait SET y = 1
PREPARE p AS UPDATE old_loose SET v = $1; ALTER TABLE old_loose ADD COLUMN w int; EXECUTE p ('d'); DEALLOCATE p
BEGIN; CREATE TABLE cur (x int); INSERT INTO cur VALUES (1), (2); DECLARE c CURSOR FOR SELECT * FROM cur FOR UPDATE; FETCH c; UPDATE cur SET x = 5 WHERE CURRENT OF c; COMMIT
DROP OWNED BY somebody_{suffix}
DROP ROLE somebody_{suffix}
DROP TABLE a, a2, c1, r CASCADE
"""

NEWEST_ONLY = """
CREATE TABLE v1 (id int, twice int GENERATED ALWAYS AS (id * 2) VIRTUAL)
INSERT INTO v1 VALUES (1)
UPDATE v1 SET id = 2
DELETE FROM v1
CREATE TABLE v2 (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) VIRTUAL); INSERT INTO v2 VALUES (1); UPDATE v2 SET id = 2
ALTER TABLE v2 DROP CONSTRAINT v2_pkey
UPDATE v2 SET id = 3
ALTER TABLE old_leaf ADD COLUMN never int GENERATED ALWAYS AS (1) VIRTUAL
UPDATE old_loose SET v = 'e'
ALTER TABLE old_loose ADD COLUMN twice text GENERATED ALWAYS AS (v || v) VIRTUAL
UPDATE old_loose SET v = 'f'
CREATE TABLE after_v (x int); INSERT INTO after_v VALUES (1); UPDATE after_v SET x = 2
"""


def lines(script: str, suffix: str) -> list[str]:
    return [line.replace("{suffix}", suffix) for line in script.strip().splitlines()]


def run(dsn: str, statements: list[str], suffix: str) -> list[tuple[Any, ...]]:
    """Run each line in a session of its own; return what a client sees of it."""
    seen = []
    for line in statements:
        statement, _, data = line.partition(" << ")
        with contextlib.closing(connect(dsn, application_name="test")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SET search_path = public")
                try:
                    if data:
                        *first, last = statement.split("; ")
                        if first:
                            cursor.execute("BEGIN")
                            cursor.execute("; ".join(first))
                        cursor.copy_expert(last, io.StringIO(data + "\n"))
                        if first:
                            cursor.execute("COMMIT")
                    else:
                        cursor.execute(statement.encode())
                    rows = cursor.fetchall() if cursor.description else None
                    outcome: tuple[Any, ...] = ("done", cursor.statusmessage, rows)
                except psycopg2.Error as error:
                    outcome = ("failed", error.pgcode, error.diag.message_primary, error.diag.message_detail)
            notices = [text.replace(suffix, "") for text in connection.notices]
            seen.append((line.replace(suffix, ""), *(str(part).replace(suffix, "") for part in outcome), notices))
    return seen


def named() -> Profile:
    """A profile that names tables, some that come later among them."""
    names = [
        "old_keyed",
        "old_loose",
        "old_deferrable",
        "old_leaf",
        "old_index",
        "a2",
        "a3",
        "a7",
        "c2",
        "g",
        "r1",
        "r2",
    ]
    rules = tuple(TableRule("public", name, Policy.MIRROR) for name in names)
    return Profile("named", rules, False, True, False, (), (), (), (), "0" * 64)


def with_local() -> Profile:
    """All tables, but one is each node's own: schema public cannot be published as a whole."""
    rules = (TableRule("public", "a4", Policy.LOCAL),)
    return Profile("with_local", rules, True, True, False, (), (), (), (), "0" * 64)


# PostgreSQL lets no table become unlogged that a publication lists by name.
LISTED = "cannot change table"


@pytest.mark.parametrize(
    "profile",
    [load_profile("mirror"), *(pytest.param(one, marks=pytest.mark.campaign) for one in (named(), with_local()))],
    ids=lambda profile: profile.name,
)
def test_the_same_statements_end_the_same(server: EmbeddedPostgres, profile: Profile) -> None:
    without, attached = Database(server, "without"), Database(server, "attached")
    results = {}
    for database, suffix in ((without, "alone"), (attached, "beside")):
        assert all(outcome[1] == "done" for outcome in run(database.dsn, lines(BEFORE, suffix), suffix))
        if database is attached:
            database.provision(profile)
        newest = NEWEST_ONLY if server.version >= 18 else ""
        script = lines(SCRIPT, suffix) + (lines(newest, suffix) if newest else [])
        results[database.dsn] = run(database.dsn, script, suffix)
    differences = [(alone, beside) for alone, beside in zip(*results.values(), strict=True) if alone != beside]
    failed = sum(outcome[1] == "failed" for outcome in results[without.dsn])
    print(f"{len(results[without.dsn])} statements, {failed} of them meant to fail, {len(differences)} differences")
    for alone, beside in differences:
        print(f"  without: {alone}\n  attached: {beside}")
    if profile.name == "with_local":
        differences = [pair for pair in differences if LISTED not in str(pair[1])]
    assert differences == []
    # What is published could be updated: PostgreSQL itself would have refused, and nothing waits to be put right.
    kept = attached.sql("SELECT count(*) FROM pmgsync.tables WHERE wanted AND NOT usable")
    assert kept == [(0,)]
    attached.sql("SELECT pmgsync.maintain()")
    deprovision(attached.dsn)
    # An identity whose index was dropped is none.
    content = (
        "SELECT relname::text, CASE WHEN relreplident = 'i' AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid "
        "AND indisreplident) THEN 'n' ELSE relreplident::text END "
        "FROM pg_class AS c WHERE relkind = 'r' AND relnamespace = 2200 ORDER BY 1"
    )
    assert attached.sql(content) == without.sql(content)


def published(database: Database) -> set[str]:
    return {
        name.decode() for (name,) in database.sql("SELECT schemaname || '.' || tablename FROM pg_publication_tables")
    }


def test_what_is_created_later_is_published_from_its_first_row(server: EmbeddedPostgres) -> None:
    database = Database(server)
    database.provision(load_profile("mirror"))
    database.sql(
        "CREATE TABLE public.a AS SELECT 1 AS x; CREATE SCHEMA s CREATE TABLE b (x int); INSERT INTO s.b VALUES (2)"
    )
    database.sql("CREATE TEMP TABLE t AS SELECT 3 AS x; CREATE UNLOGGED TABLE public.u AS SELECT 4 AS x")
    database.sql("SELECT 5 AS x INTO public.c")
    assert published(database) == {"public.a", "s.b", "public.c"}
    options = "'proto_version', '1', 'publication_names', 'pmgsync', 'messages', 'true'"
    query = f"SELECT data FROM pg_logical_slot_peek_binary_changes('pmgsync', NULL, NULL, {options})"
    inserted = [bytes(data) for (data,) in database.sql(query) if bytes(data)[:1] == b"I"]
    assert [data[-1:] for data in inserted] == [b"1", b"2", b"5"]


def test_tables_of_a_named_profile_join_and_leave(server: EmbeddedPostgres) -> None:
    database = Database(server)
    database.sql("CREATE TABLE public.a2 (x int); CREATE TABLE public.other (x int)")
    database.provision(named(), take_over_cid0=False)
    assert published(database) == {"public.a2"}
    database.sql("ALTER TABLE public.a2 RENAME TO a2_old; CREATE TABLE public.a2 (x int); DROP TABLE public.other")
    assert published(database) == {"public.a2"}
    database.sql("CREATE TABLE public.fresh (x int); ALTER TABLE public.fresh RENAME TO a3")
    assert published(database) == {"public.a2", "public.a3"}


def test_a_key_that_comes_later_is_used(server: EmbeddedPostgres) -> None:
    database = Database(server)
    database.provision(load_profile("mirror"))
    identity = "SELECT relreplident::text FROM pg_class WHERE relname = 't'"
    database.sql("CREATE TABLE public.t (id int NOT NULL)")
    assert database.sql(identity) == [(b"f",)]
    database.sql("ALTER TABLE public.t ADD PRIMARY KEY (id)")
    database.sql("SELECT pmgsync.maintain()")
    assert database.sql(identity) == [(b"d",)]
    # What the application chose by itself stays.
    database.sql("CREATE TABLE public.own (id int PRIMARY KEY); ALTER TABLE public.own REPLICA IDENTITY FULL")
    database.sql("SELECT pmgsync.maintain()")
    assert database.sql(identity.replace("'t'", "'own'")) == [(b"f",)]
    database.sql("DROP TABLE public.t, public.own")
    database.sql("SELECT pmgsync.maintain()")
    assert database.sql("SELECT count(*) FROM pmgsync.replica_identity") == [(0,)]


@pytest.fixture
def two_sessions(server: EmbeddedPostgres) -> Iterator[tuple[Database, Any, Any]]:
    database = Database(server)
    database.provision(load_profile("mirror"))
    with database.connection() as first, database.connection() as second:
        yield database, first.cursor(), second.cursor()


def test_creating_tables_side_by_side_waits_for_nobody(two_sessions: tuple[Database, Any, Any]) -> None:
    _, first, second = two_sessions
    for cursor in (first, second):
        cursor.execute("SET lock_timeout = '2s'")
        cursor.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
    for number, cursor in enumerate((first, second, first, second)):
        cursor.execute(f"CREATE TABLE public.s{number} (x int)")
        cursor.execute(f"INSERT INTO public.s{number} VALUES (1); UPDATE public.s{number} SET x = 2")
        cursor.execute(f"ALTER TABLE public.s{number} ADD PRIMARY KEY (x)")
    for cursor in (first, second):
        cursor.execute("COMMIT")
        assert [text for text in cursor.connection.notices if "WARNING" in text] == []


def test_a_broken_watch_breaks_nothing(two_sessions: tuple[Database, Any, Any]) -> None:
    database, first, _ = two_sessions
    database.sql("ALTER TABLE pmgsync.replica_identity RENAME TO gone")
    first.execute("CREATE TABLE public.t (x int)")
    assert "pmgsync will look at this again" in first.connection.notices[-1]
    database.sql("ALTER TABLE pmgsync.gone RENAME TO replica_identity")
    database.sql("SELECT pmgsync.maintain()")
    first.execute("INSERT INTO public.t VALUES (1); UPDATE public.t SET x = 2")
