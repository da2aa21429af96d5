"""Changes of the schema go through the stream, in their place among the rows, and come to the same elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Policy
from tests.harness.cluster import Cluster, eventually
from tests.harness.schema import STANDARD
from tests.harness.server import Pair, make_profile, rule

# Everything that a schema is made of, as text.
CATALOG = """
SELECT 'table ' || c.oid::regclass || c.relkind::text || c.relpersistence::text || ' ' || pmgsync.shape(c.oid)
       || pg_get_userbyid(c.relowner)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname !~ '^pg_|^information_schema$|^pmgsync$'
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S')
UNION ALL SELECT 'index ' || pg_get_indexdef(i.indexrelid)
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname !~ '^pg_|^pmgsync$'
UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace::regnamespace::text !~ '^pg_|^information_schema$|^pmgsync$'
UNION ALL SELECT 'view ' || pg_get_viewdef(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('v', 'm') AND n.nspname !~ '^pg_|^information_schema$|^pmgsync$'
UNION ALL SELECT 'function ' || pg_get_functiondef(p.oid) || pg_get_userbyid(p.proowner) FROM pg_proc p
WHERE pronamespace::regnamespace::text !~ '^pg_|^information_schema$|^pmgsync$' AND prokind IN ('f', 'p')
UNION ALL SELECT 'type ' || t.oid::regtype || t.typtype::text FROM pg_type t
WHERE typnamespace::regnamespace::text !~ '^pg_|^information_schema$|^pmgsync$'
UNION ALL SELECT 'label ' || e.enumlabel FROM pg_enum e
UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid) || tgenabled::text FROM pg_trigger
WHERE NOT tgisinternal AND tgname !~ '^pmgsync'
UNION ALL SELECT 'comment ' || description FROM pg_description WHERE objoid >= 16384
UNION ALL SELECT 'acl ' || c.oid::regclass || c.relacl::text FROM pg_class c
WHERE c.relacl IS NOT NULL AND c.relnamespace::regnamespace::text !~ '^pg_|^information_schema$|^pmgsync$'
UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname !~ '^pg_|^pmgsync$'
ORDER BY 1
"""


class Studio(Pair):
    """A pair whose source is used as an application uses it."""

    def __init__(self, server: EmbeddedPostgres, **options: object) -> None:
        super().__init__(server, make_profile(*options.pop("rules", ()), ddl=True), **options)  # type: ignore[arg-type, misc]
        self.application = psycopg2.connect(server.dsn(self.names[0]))
        self.application.autocommit = True

    def write(self, *scripts: str) -> None:
        """Send strings to the source, each as one simple query."""
        for script in scripts:
            with self.application.cursor() as cursor:
                cursor.execute(script)

    def catalog(self, *, source: bool) -> list[str]:
        connection = self.source if source else self.target
        return [text.decode() for (text,) in self.run(CATALOG, on=connection)]  # type: ignore[attr-defined]

    def stale(self) -> dict[str, str]:
        found = self.run("SELECT name::text, reason FROM pmgsync.stale_table WHERE kind = 'table'", on=self.target)
        return {name.decode(): reason.decode() for name, reason in found}  # type: ignore[attr-defined]

    def failures(self) -> list[tuple[str, ...]]:
        found = self.run("SELECT change, statement, error FROM pmgsync.schema_failure ORDER BY id", on=self.target)
        return [tuple(value.decode() for value in row) for row in found]  # type: ignore[attr-defined]

    def same(self, *scripts: str) -> None:
        """Run scripts on the source, apply them, and compare schema and rows."""
        self.write(*scripts)
        self.apply()
        assert self.failures() == []
        assert self.stale() == {}
        assert self.catalog(source=True) == self.catalog(source=False)
        self.assert_equal()

    def close(self) -> None:
        self.application.close()
        super().close()


@pytest.fixture
def studio(server: EmbeddedPostgres) -> Iterator[Studio]:
    with contextlib.closing(Studio(server)) as made:
        made.setup("SELECT", watched=True)
        yield made


def test_tables_change_between_rows(studio: Studio) -> None:
    studio.same(
        "CREATE TABLE t (id serial PRIMARY KEY, a text); INSERT INTO t (a) VALUES ('one');"
        "ALTER TABLE t ADD b int DEFAULT 7; INSERT INTO t (a, b) VALUES ('two', 2);"
        "ALTER TABLE t RENAME a TO c; UPDATE t SET c = c || '!' WHERE id = 1",
        "INSERT INTO t (c) VALUES ('three'); ALTER TABLE t DROP c; INSERT INTO t (b) VALUES (3)",
        "ALTER TABLE t RENAME TO u; INSERT INTO u (b) VALUES (4)",
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); DROP TABLE u;"
        " CREATE TABLE u (x int UNIQUE NOT NULL)",
        "INSERT INTO u VALUES (1), (2); DROP TABLE IF EXISTS u, nowhere; CREATE TABLE u (y text PRIMARY KEY);"
        " INSERT INTO u VALUES ('y')",
    )


def test_all_that_a_schema_is_made_of(studio: Studio) -> None:
    studio.same(
        'CREATE SCHEMA "O\'dd.""one"; CREATE TABLE "O\'dd.""one"."a b" ("c;d" int PRIMARY KEY)',
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); ALTER TYPE mood ADD VALUE 'great'",
        "CREATE DOMAIN short AS varchar(5) CHECK (value <> 'x')",
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, m mood, s short)",
        "ALTER TABLE t ADD COLUMN IF NOT EXISTS n int DEFAULT 5; ALTER TABLE t ADD COLUMN IF NOT EXISTS n int",
        "CREATE TABLE generated (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED)",
        "INSERT INTO t (m, s) VALUES ('great', 'abc')",
        "CREATE INDEX CONCURRENTLY i ON t (m)",
        "CREATE UNIQUE INDEX ON t (s, lower(s)) WHERE s <> 'q'",
        "CREATE VIEW v AS SELECT id, 'a;b' AS x FROM t; CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM t",
        "REFRESH MATERIALIZED VIEW mv; COMMENT ON TABLE t IS 'it''s; new'; COMMENT ON COLUMN t.m IS 'mood'",
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN RETURN NEW; /* ; */ END $f$",
        "CREATE TRIGGER tr BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "ALTER TABLE t DISABLE TRIGGER tr; ALTER TABLE t ADD CONSTRAINT positive CHECK (id > 0)",
        "CREATE TABLE child (id int PRIMARY KEY, t int REFERENCES t ON DELETE CASCADE);"
        " INSERT INTO child VALUES (1, 1)",
        "CREATE TABLE p (id int, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1, 'in one')",
        "ALTER TABLE p ADD w text DEFAULT 'w'; CREATE TABLE p2 (LIKE p); ALTER TABLE p2 ADD PRIMARY KEY (id)",
        "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20); INSERT INTO p VALUES (11, 'in two', 'x')",
        "ALTER TABLE p DETACH PARTITION p1",
        "CREATE SEQUENCE sq START 5; ALTER SEQUENCE sq INCREMENT 3",
        "CREATE RULE r AS ON INSERT TO v DO INSTEAD NOTHING; DROP VIEW v",
        "DROP INDEX CONCURRENTLY i",
        "CREATE STATISTICS st ON m, s FROM t; DROP FUNCTION f()",
        'SET search_path = "O\'dd.""one", public; CREATE TABLE found (id int PRIMARY KEY); SET search_path = public',
        "SET datestyle = 'German'; CREATE TABLE dated (id int PRIMARY KEY, d date DEFAULT '02.03.2004');"
        " RESET datestyle",
        "ALTER TABLE t RENAME CONSTRAINT positive TO above;"
        " ALTER TABLE child ALTER t SET NOT NULL, ALTER t SET STORAGE PLAIN",
        'GRANT SELECT ON t TO PUBLIC; REVOKE TRUNCATE ON t FROM PUBLIC; DROP SCHEMA "O\'dd.""one" CASCADE',
    )


def test_inside_functions(studio: Studio) -> None:
    studio.same(
        "DO $$ BEGIN CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1); "
        "EXECUTE format('CREATE TABLE %I (id int PRIMARY KEY, q text DEFAULT ''\"'')', 'made by'); END $$",
        "INSERT INTO \"made by\" VALUES (1, E'\\n'); ALTER TABLE t ADD c int",
        "CREATE FUNCTION outer_one() RETURNS void LANGUAGE plpgsql AS 'BEGIN PERFORM inner_one(); END'",
        "CREATE FUNCTION inner_one() RETURNS void LANGUAGE plpgsql AS 'BEGIN ALTER TABLE t ADD d int; END'",
        "SELECT outer_one(); UPDATE t SET d = 5; CREATE TABLE later (id int PRIMARY KEY)",
        "SET lc_messages = 'C'; DO 'BEGIN DROP TABLE later; END'",
    )
    # What an SQL function executes is not told.
    studio.write("CREATE FUNCTION s() RETURNS void LANGUAGE sql AS 'CREATE TABLE hidden (id int PRIMARY KEY)'")
    studio.write("SELECT s()", "INSERT INTO hidden VALUES (1)")
    studio.apply()
    ((change, statement, error),) = studio.failures()
    assert change == "CREATE TABLE (index public.hidden_pkey, table public.hidden)"
    assert (statement, "inside a function" in error) == ("", True)
    assert studio.stale() == {"hidden": "it could not be made here"}


def test_what_cannot_be_repeated_is_fetched(studio: Studio) -> None:
    studio.write(
        "CREATE TABLE volatile (id int PRIMARY KEY); INSERT INTO volatile SELECT generate_series(1, 20)",
        "CREATE TABLE stable (id int PRIMARY KEY); INSERT INTO stable VALUES (1)",
        "CREATE TABLE typed (id int PRIMARY KEY, v int); INSERT INTO typed VALUES (1, 1)",
        "ALTER TABLE volatile ADD r float DEFAULT random();"
        " ALTER TABLE stable ADD t timestamptz DEFAULT clock_timestamp()",
        "ALTER TABLE typed ALTER v TYPE text USING 'x' || v",
        "CREATE TABLE quick (id int PRIMARY KEY); INSERT INTO quick VALUES (1)",
        "ALTER TABLE quick ADD n timestamptz DEFAULT now()",
        "CREATE TABLE copied AS SELECT 1 AS id, 'x'::text COLLATE \"C\" AS v; SELECT 2 AS id INTO selected",
        "CREATE UNLOGGED TABLE late (id int PRIMARY KEY); INSERT INTO late VALUES (1); ALTER TABLE late SET LOGGED",
    )
    studio.apply()
    assert studio.failures() == []
    anew = "its rows were written anew on the origin"
    stale = studio.stale()
    assert set(stale) == {"volatile", "stable", "typed", "quick", "copied", "selected", "late"}
    assert (stale["volatile"], stale["typed"]) == (anew, anew)
    assert stale["quick"] == "its columns are not the same here"
    # Everything is the same but the value that a row without the column has.
    differing = set(studio.catalog(source=True)) ^ set(studio.catalog(source=False))
    assert all(text.startswith("table quick") for text in differing)


def test_what_does_not_travel(studio: Studio) -> None:
    studio.write(
        "CREATE TEMP TABLE gone (id int); CREATE TABLE IF NOT EXISTS t (id int PRIMARY KEY); DROP TABLE gone",
        "CREATE TABLE IF NOT EXISTS t (id int PRIMARY KEY); CREATE PUBLICATION other; DROP PUBLICATION other",
        "BEGIN; CREATE TABLE undone (id int); ROLLBACK",
    )
    frames = studio.frames()
    assert sum(frame.header.changes for frame in frames) == 1
    studio.apply(frames)
    assert studio.failures() == []
    assert studio.catalog(source=True) == studio.catalog(source=False)
    # A message in pmgsync's name that was not written by it.
    studio.write("SELECT pg_logical_emit_message(true, 'pmgsync.schema', repeat('x', 500))")
    assert studio.frames() == []
    assert studio.framer.forged == 1


def test_a_local_table_keeps_its_schema(server: EmbeddedPostgres) -> None:
    with contextlib.closing(Studio(server, rules=(rule("own", Policy.LOCAL),))) as studio:
        studio.setup("SELECT", watched=True)
        studio.write(
            "CREATE TABLE own (id serial PRIMARY KEY, v text); CREATE INDEX ON own (v); CREATE TABLE t (id int)"
        )
        studio.write("ALTER TABLE own DROP v; DROP TABLE own")
        studio.apply()
        assert studio.failures() == []
        assert studio.run("SELECT to_regclass('own') IS NULL, to_regclass('t') IS NULL", on=studio.target) == [
            (True, False)
        ]


def test_what_fails_is_said_and_the_rest_goes_on(studio: Studio) -> None:
    studio.run("CREATE VIEW here AS SELECT 1 AS x; CREATE TABLE taken (z int)", on=studio.target)
    studio.write("CREATE TABLE flows (id int PRIMARY KEY)", "CREATE ROLE pmgsync_test_role")
    try:
        studio.write(
            "INSERT INTO flows VALUES (1); CREATE VIEW here AS SELECT 2 AS y; INSERT INTO flows VALUES (2)",
            "CREATE TABLE taken (id int PRIMARY KEY); INSERT INTO taken VALUES (1); INSERT INTO flows VALUES (3)",
            "DROP TABLE taken; CREATE TABLE taken (id int PRIMARY KEY); INSERT INTO taken VALUES (5)",
        )
        studio.apply()
        assert [change for change, *_ in studio.failures()] == [
            "CREATE VIEW (view public.here)", "CREATE TABLE (index public.taken_pkey, table public.taken)",
        ]  # fmt: skip
        assert "already exists" in studio.failures()[0][2]
        # Made anew on both sides, the table is in step again.
        assert studio.stale() == {}
        assert studio.table("taken", on=studio.target) == studio.table("taken")
        assert studio.table("flows", on=studio.target) == studio.table("flows")
        with studio.applier() as applier:
            assert [text.split(":")[0] for text in applier.failures] == [
                "a change of the schema on node 1 could not be repeated here"
            ] * 2
        # As whoever did it, there: the role owns what it makes.
        studio.run(
            "DELETE FROM pmgsync.schema_failure; DROP VIEW here; CREATE VIEW here AS SELECT 2 AS y", on=studio.target
        )
        studio.same(
            "GRANT CREATE ON SCHEMA public TO pmgsync_test_role; SET ROLE pmgsync_test_role;"
            " CREATE TABLE mine (id int PRIMARY KEY)",
            "INSERT INTO mine VALUES (1); CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'; RESET ROLE",
        )
    finally:
        for connection in (studio.target, studio.source):
            studio.run("DROP OWNED BY pmgsync_test_role", on=connection)
        studio.write("DROP ROLE pmgsync_test_role")


def test_a_copy_that_is_newer_than_a_change(studio: Studio) -> None:
    """The table that was fetched by its name may have been another one: the name changed hands meanwhile."""
    studio.same("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
    studio.run(
        "INSERT INTO pmgsync.stale_table (origin, schema, name, kind, reason, lsn, until) "
        "VALUES (1, 'public', 't', 'none', '', '0/1', 'FF/0')",
        on=studio.target,
    )
    studio.write("ALTER TABLE t RENAME TO was_t; ALTER TABLE u RENAME TO t; INSERT INTO was_t VALUES (1)")
    studio.apply()
    assert studio.stale() == {"was_t": "its copy here is newer than a change of it", "t": studio.stale()["was_t"]}
    # Dropped, the copy is gone too, and what follows counts.
    studio.same("DROP TABLE t, was_t; CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (2)")


def test_in_a_large_transaction(studio: Studio) -> None:
    """Changes of the schema in the middle of parts, repeated when a part is executed again row by row."""
    studio.framer = studio._framer(studio.framer.position, 2000)
    studio.write(
        "BEGIN; CREATE TABLE t (id int PRIMARY KEY, a text);"
        " INSERT INTO t SELECT n, repeat('x', 100) FROM generate_series(1, 100) n;"
        "ALTER TABLE t ADD b int; UPDATE t SET b = id; ALTER TABLE t DROP a;"
        " INSERT INTO t SELECT n, n FROM generate_series(101, 200) n;"
        "CREATE TABLE u (id int PRIMARY KEY); DELETE FROM t WHERE id % 2 = 0; INSERT INTO u SELECT b FROM t; COMMIT"
    )
    frames = studio.frames()
    assert len(frames) > 5
    studio.apply(frames)
    assert studio.failures() == []
    assert studio.stale() == {}
    studio.assert_equal()


@pytest.mark.cluster
def test_on_a_cluster(new_cluster: Callable[..., Cluster]) -> None:
    """With the guard, the publication and fetching: what is made on the master is soon on the node, with its rows."""
    cluster = new_cluster(nodes=2, schema=STANDARD)
    master, slave = cluster.nodes
    master.sql("ALTER TABLE t ADD r float DEFAULT random(); INSERT INTO t (id) SELECT generate_series(1, 50)")
    master.sql("CREATE TABLE made AS SELECT n AS id, 'x' || n AS v FROM generate_series(1, 100) n; CREATE SCHEMA more")
    master.sql(
        "CREATE TABLE more.keyless (v text); INSERT INTO more.keyless VALUES ('a'), ('a');"
        " UPDATE more.keyless SET v = 'b'"
    )
    master.sql("DO 'BEGIN CREATE TABLE from_do (id int PRIMARY KEY); END'; INSERT INTO from_do VALUES (1)")
    cluster.wait()
    tables = ["t", "made", "more.keyless", "from_do"]
    eventually(lambda: not slave.sql("SELECT 1 FROM pmgsync.stale_table WHERE kind <> 'none'"), what="nothing is stale")
    cluster.assert_equal(tables)
    guarded = "SELECT 1 FROM pg_trigger WHERE tgname = 'pmgsync_guard' AND tgrelid = 'more.keyless'::regclass"
    eventually(lambda: slave.sql(guarded), what="the new table is guarded")
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        slave.sql("INSERT INTO more.keyless VALUES ('c')")
    # What a node does to its own schema stays there.
    slave.sql("CREATE TABLE own (id int)")
    master.sql("INSERT INTO made VALUES (500, 'y')")
    cluster.wait()
    cluster.assert_equal(tables)
    assert master.sql("SELECT to_regclass('own') IS NULL, to_regclass('pg_trigger') IS NULL") == [(True, False)]
    assert slave.sql("SELECT count(*) FROM pmgsync.schema_failure") == [(0,)]
    # One that cannot be repeated is told by status and doctor, with what to do.
    master.sql("CREATE VIEW own AS SELECT 1 AS x; INSERT INTO made VALUES (501, 'z')")
    cluster.wait()
    told = "a change of the schema on node 1 could not be repeated here: CREATE VIEW (view public.own)"
    eventually(lambda: any(told in alert["text"] for alert in slave.node_status(2)["alerts"]), what="an alert")
    done = slave.pmgcm("doctor", check=False)
    assert done.returncode == 1
    assert told in done.stdout.replace("\n", " ")
    assert "DELETE FROM pmgsync.schema_failure WHERE id = 1" in done.stdout
    cluster.assert_equal(tables)
