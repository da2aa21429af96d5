"""The guard: what the master writes is refused on the others, by every way there is, and by nobody on the master."""

from __future__ import annotations

import contextlib
import subprocess

import psycopg2
import psycopg2.errors
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.membership import Member
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.errors import UnreachableError
from pmgsync.postgres.programs import pg_tool
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.guard import ensure_guard, guarded_by, unguarded
from pmgsync.postgres.setup.provision import deprovision
from pmgsync.profile_file import load_profile
from tests.harness.database import Database

MASTER = Member(1, "gate1", "192.0.2.1", 1, 2, 3, b"c" * 32, b"s" * 32, "master")

SCHEMA = """
SET search_path = public;
CREATE TABLE plain (id int PRIMARY KEY, v text);
CREATE TABLE root (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (100);
CREATE TABLE child () INHERITS (plain);
CREATE SCHEMA "O'dd";
CREATE TABLE "O'dd"."t.""a b" (id int);
CREATE UNLOGGED TABLE scratch (id int);
INSERT INTO plain VALUES (1, 'one');
INSERT INTO root VALUES (1, 'one');
"""

WRITES = [
    "INSERT INTO plain VALUES (2)",
    "UPDATE plain SET v = '' WHERE false",
    "DELETE FROM ONLY plain",
    "TRUNCATE plain CASCADE",
    "COPY plain FROM STDIN",
    "MERGE INTO plain USING (VALUES (1)) AS s (id) ON plain.id = s.id WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM child RETURNING 1) SELECT * FROM gone",
    "INSERT INTO root VALUES (1)",
    "UPDATE leaf SET v = ''",
    "TRUNCATE root",
    """INSERT INTO "O'dd"."t.""a b" VALUES (1)""",
]


@pytest.fixture
def mirror() -> Profile:
    return load_profile("mirror")


@pytest.fixture
def slave(server: EmbeddedPostgres, mirror: Profile) -> Database:
    """A provisioned database that is guarded."""
    database = Database(server)
    database.sql(SCHEMA)
    database.provision(mirror, cid=2)
    ensure_guard(database.dsn, mirror, master=MASTER)
    return database


def write(database: Database, statement: str, *, replica: bool = False) -> None:
    with contextlib.closing(connect(database.dsn, application_name="test", replica=replica)) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path = public")
            if "STDIN" in statement:
                import io

                cursor.copy_expert(statement, io.StringIO("7\tx\n"))
            else:
                cursor.execute(statement)
        connection.rollback()


def test_every_way_to_write_is_refused_and_says_where_to_go(slave: Database) -> None:
    for statement in WRITES:
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=r"gate1 \(192\.0\.2\.1\)") as caught:
            write(slave, statement)
        assert "Make this change on gate1" in (caught.value.diag.message_hint or "")
        # Applying, restoring and resynchronising work under this role.
        write(slave, statement, replica=True)
    write(slave, "INSERT INTO scratch VALUES (1)")
    write(slave, "CREATE TEMP TABLE t AS SELECT * FROM plain; DELETE FROM t")


def test_a_plain_user_gets_the_same_words(slave: Database) -> None:
    slave.sql(
        "CREATE ROLE plain_user LOGIN; GRANT ALL ON SCHEMA public TO plain_user; "
        "GRANT ALL ON public.plain TO plain_user"
    )
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="gate1"):
        write(slave, "SET ROLE plain_user; DELETE FROM plain")
    # A table of their own is made and published, though they may not look into pmgsync.
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="own"):
        write(slave, "SET ROLE plain_user; CREATE TABLE own (x int); INSERT INTO own VALUES (1)")


def test_tables_that_come_later_are_guarded(slave: Database) -> None:
    made = [
        "CREATE TABLE t1 (id int)",
        "CREATE TABLE t1 AS SELECT 1 AS id",
        "SELECT 1 AS id INTO t1",
        "CREATE TABLE t1 PARTITION OF root FOR VALUES FROM (100) TO (200)",
        "CREATE TABLE t2 (id int); DROP TRIGGER pmgsync_guard ON t2; ALTER TABLE t2 RENAME TO t1",
        "CREATE TABLE t1 (id int) PARTITION BY LIST (id)",
    ]
    for statement in made:
        write(slave, statement, replica=True)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="t1"):
            write(slave, f"{statement}; DELETE FROM t1")
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="t1"):
            write(
                slave,
                f"SET session_replication_role = replica; {statement}; RESET session_replication_role; DELETE FROM t1",
            )


def test_the_master_and_one_that_becomes_it_refuse_nothing(slave: Database, mirror: Profile) -> None:
    ensure_guard(slave.dsn, mirror, master=None)
    for statement in WRITES:
        write(slave, statement)
    with slave.connection() as connection:
        assert guarded_by(connection) is None
    left = "SELECT count(*) FROM pg_trigger WHERE tgname = 'pmgsync_guard'"
    assert slave.sql(left) == [(0,)]
    dump = subprocess.run(
        [pg_tool("pg_dump"), "--schema-only", "--exclude-schema=pmgsync", slave.dsn], capture_output=True, check=True
    ).stdout
    assert b"pmgsync_guard" not in dump
    assert b"refuse" not in dump
    ensure_guard(slave.dsn, mirror, master=MASTER)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        write(slave, WRITES[0])
    with slave.connection() as connection:
        assert (guarded_by(connection), unguarded(connection)) == ("gate1", [])


def test_opening_works_at_once_though_tables_are_in_use(slave: Database, mirror: Profile) -> None:
    with slave.connection() as reader:
        reader.cursor().execute("BEGIN; SELECT * FROM public.plain")
        with pytest.raises(UnreachableError, match=r"in use .*public\.plain"):
            ensure_guard(slave.dsn, mirror, master=None, patience_s=0)
        write(slave, WRITES[0])
        reader.cursor().execute("COMMIT")
    ensure_guard(slave.dsn, mirror, master=None)
    assert slave.sql("SELECT count(*) FROM pg_trigger WHERE tgname = 'pmgsync_guard'") == [(0,)]


def test_a_table_in_use_is_guarded_later_and_the_others_now(slave: Database, mirror: Profile) -> None:
    ensure_guard(slave.dsn, mirror, master=None)
    with slave.connection() as writer:
        writer.cursor().execute("BEGIN; INSERT INTO public.plain VALUES (5)")
        with pytest.raises(UnreachableError, match=r"public\.plain"):
            ensure_guard(slave.dsn, mirror, master=MASTER, patience_s=0)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            write(slave, "DELETE FROM leaf")
        writer.cursor().execute("COMMIT")
    ensure_guard(slave.dsn, mirror, master=MASTER)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        write(slave, "DELETE FROM plain")


def test_a_trigger_that_was_dropped_or_disabled_comes_back(slave: Database, mirror: Profile) -> None:
    slave.sql("DROP TRIGGER pmgsync_guard ON public.leaf; ALTER TABLE public.plain DISABLE TRIGGER pmgsync_guard")
    with slave.connection() as connection:
        assert unguarded(connection) == ["public.leaf", "public.plain"]
    ensure_guard(slave.dsn, mirror, master=MASTER)
    for statement in ("DELETE FROM leaf", "DELETE FROM plain"):
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            write(slave, statement)


def test_a_new_master_is_named(slave: Database, mirror: Profile) -> None:
    other = Member(3, "gate3", "192.0.2.3", 1, 2, 3, b"c" * 32, b"s" * 32, "master")
    ensure_guard(slave.dsn, mirror, master=other)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=r"gate3 \(192\.0\.2\.3\)"):
        write(slave, WRITES[0])


def test_only_what_the_master_alone_writes(server: EmbeddedPostgres) -> None:
    rules = (
        TableRule("public", "plain", Policy.MIRROR),
        TableRule("public", "child", Policy.LOCAL),
        TableRule("public", "leaf", Policy.OWNED, owner="id"),
    )
    profile = Profile("test", rules, False, True, False, (), (), (), (), "0" * 64)
    database = Database(server)
    database.sql(SCHEMA)
    database.provision(profile, cid=2, take_over_cid0=False)
    ensure_guard(database.dsn, profile, master=MASTER)
    for statement in (
        "INSERT INTO child VALUES (1)",
        "UPDATE leaf SET v = ''",
        "DELETE FROM root",
        "CREATE TABLE x (i int); DELETE FROM x",
    ):
        write(database, statement)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        write(database, "DELETE FROM plain")
    # A package upgrade makes it anew.
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        write(database, "DROP TABLE plain CASCADE; CREATE TABLE plain (id int PRIMARY KEY); DELETE FROM plain")


def test_nothing_is_left_when_the_node_leaves(slave: Database) -> None:
    deprovision(slave.dsn)
    for statement in WRITES:
        write(slave, statement)
    left = "SELECT (SELECT count(*) FROM pg_event_trigger), (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal)"
    assert slave.sql(left) == [(0, 0)]
