"""`create` beside transactions of an application: none of its statements fails because something is published now."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Profile
from pmgsync.postgres.setup.provision import deprovision
from pmgsync.profile_file import load_profile
from tests.harness.cluster import eventually
from tests.harness.database import Database
from tests.harness.workload import Stoppable

pytestmark = pytest.mark.cluster

SCHEMA = """
CREATE TABLE public.loose (x int);
INSERT INTO public.loose VALUES (1), (1);
CREATE TABLE public.keyed (x int PRIMARY KEY);
INSERT INTO public.keyed VALUES (1), (2);
"""
UNUSABLE = "SELECT schema || '.' || name FROM pmgsync.tables WHERE wanted AND NOT usable"


@pytest.fixture
def app(server: EmbeddedPostgres) -> Database:
    database = Database(server)
    database.sql(SCHEMA)
    return database


class Creating:
    """Provisioning, in a thread."""

    def __init__(self, database: Database) -> None:
        self.told: list[str] = []
        self.error: BaseException | None = None
        profile = load_profile("mirror")
        self._thread = threading.Thread(target=self._run, args=(database, profile), daemon=True)
        self._thread.start()

    def _run(self, database: Database, profile: Profile) -> None:
        try:
            database.provision(profile, progress=self.told.append)
        except BaseException as error:
            self.error = error

    def wait_until_waiting(self, pid: int) -> None:
        """Return when it has said that it waits for a process."""
        eventually(lambda: any(f"process {pid} " in text for text in self.told), what=f"waits for {pid}")

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            AssertionError: when it failed.
        """
        self._thread.join(60)
        assert not self._thread.is_alive(), self.told
        assert self.error is None, self.error


MAKE_LATER = """
CREATE TABLE public.late (x int); INSERT INTO public.late VALUES (1); UPDATE public.late SET x = 2;
ALTER TABLE public.keyed DROP CONSTRAINT keyed_pkey; UPDATE public.keyed SET x = x + 1
"""
BESIDE = {
    "table": ("CREATE TABLE public.early AS SELECT 1 AS x", "UPDATE public.early SET x = 2; DELETE FROM public.early"),
    "schema": ("CREATE SCHEMA s CREATE TABLE early (x int)", "UPDATE s.early SET x = 2; DELETE FROM s.early"),
    "key": ("ALTER TABLE public.keyed DROP CONSTRAINT keyed_pkey", "UPDATE public.keyed SET x = -x"),
    "identity": ("ALTER TABLE public.keyed REPLICA IDENTITY NOTHING", "DELETE FROM public.keyed"),
    "rows": ("UPDATE public.loose SET x = 2", "UPDATE public.loose SET x = 3; DELETE FROM public.loose"),
    "later": ("INSERT INTO public.keyed VALUES (7)", MAKE_LATER),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_transaction_goes_on_while_create_waits(app: Database, kind: str) -> None:
    before, later = BESIDE[kind]
    with app.connection() as holder:
        cursor = holder.cursor()
        cursor.execute("BEGIN; " + before)
        creating = Creating(app)
        creating.wait_until_waiting(holder.info.backend_pid)
        # Time to go as far as it can.
        time.sleep(1)
        cursor.execute(later)
        cursor.execute("COMMIT")
    creating.finish()
    assert app.sql(UNUSABLE) == []


def test_one_that_has_only_read_is_not_waited_for(app: Database) -> None:
    with app.connection() as holder:
        cursor = holder.cursor()
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM public.keyed")
        Creating(app).finish()
        cursor.execute("CREATE TABLE public.late (x int); INSERT INTO public.late VALUES (1)")
        cursor.execute("UPDATE public.late SET x = 2; DELETE FROM public.late; COMMIT")
    assert app.sql(UNUSABLE) == []


def test_a_statement_that_waits_for_a_lock_is_waited_for(app: Database) -> None:
    """It has begun before there was an event trigger, and has no transaction id yet."""
    with app.connection() as reader, app.connection() as holder:
        reader.cursor().execute("BEGIN; SELECT count(*) FROM public.keyed")
        cursor = holder.cursor()
        cursor.execute("BEGIN")
        alter = threading.Thread(
            target=cursor.execute, args=("ALTER TABLE public.keyed DROP CONSTRAINT keyed_pkey",), daemon=True
        )
        alter.start()
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
        eventually(lambda: app.sql(waits) == [(1,)], what="the statement waits")
        creating = Creating(app)
        creating.wait_until_waiting(holder.info.backend_pid)
        reader.cursor().execute("COMMIT")
        alter.join(20)
        time.sleep(1)
        cursor.execute("UPDATE public.keyed SET x = x + 10; COMMIT")
    creating.finish()
    assert app.sql(UNUSABLE) == []


def test_a_prepared_transaction_is_waited_for(app: Database) -> None:
    with app.connection() as holder:
        holder.cursor().execute("BEGIN; CREATE TABLE public.gift (x int); INSERT INTO public.gift VALUES (1)")
        holder.cursor().execute("PREPARE TRANSACTION 'gift'")
        creating = Creating(app)
        eventually(lambda: any("'gift'" in text for text in creating.told), what="waits")
        assert app.sql("SELECT count(*) FROM pg_publication") == [(0,)]
        holder.cursor().execute("COMMIT PREPARED 'gift'")
        creating.finish()
        holder.cursor().execute("UPDATE public.gift SET x = 2")


class Application:
    """Makes tables, changes and drops their keys, and writes to them."""

    def __init__(self, database: Database, number: int) -> None:
        self._entered = database.connection()
        self._cursor = self._entered.__enter__().cursor()
        self._number = number
        self.steps = 0
        self.errors: list[str] = []

    def step(self) -> None:
        name = f"public.t_{self._number}_{self.steps}"
        write = f"UPDATE {name} SET x = x + 1; DELETE FROM {name} WHERE x > 2"
        key = f"t_{self._number}_{self.steps}_pkey"
        # What it writes before it commits is refused just as well.
        scripts = (
            (f"CREATE TABLE {name} (x int)", f"INSERT INTO {name} VALUES (1), (2)", write),
            (f"BEGIN; CREATE TABLE {name} AS SELECT 1 AS x", write, write, "COMMIT", write),
            (f"BEGIN; CREATE TABLE {name} (x int PRIMARY KEY)", f"INSERT INTO {name} VALUES (1)", "COMMIT", write),
            (f"BEGIN; CREATE TABLE {name} (x int PRIMARY KEY)", f"ALTER TABLE {name} DROP CONSTRAINT {key}", write),
            ("COMMIT", f"CREATE SCHEMA s{key} CREATE TABLE t (x int)", f"UPDATE s{key}.t SET x = 1"),
        )
        try:
            for statement in scripts[self.steps % len(scripts)]:
                self._cursor.execute(statement)
        except psycopg2.errors.ObjectNotInPrerequisiteState as error:
            self.errors.append(f"{error}{''.join(self._cursor.connection.notices[-3:])}")
            self._cursor.execute("ROLLBACK")
        self.steps += 1
        time.sleep(0.02)

    def close(self) -> None:
        self._entered.__exit__(None, None, None)


def test_an_application_that_makes_tables_all_the_time(app: Database) -> None:
    applications = [Application(app, number) for number in range(3)]
    threads: list[Any] = [Stoppable(application.step) for application in applications]
    try:
        for _ in range(2):
            time.sleep(1)
            Creating(app).finish()
            time.sleep(1)
            deprovision(app.dsn)
    finally:
        for thread in threads:
            thread.stop()
    assert [application.errors for application in applications] == [[], [], []]
    print(f"{[application.steps for application in applications]} transactions")
    assert min(application.steps for application in applications) > 20
    for application in applications:
        application.close()
