"""The lease in the database: a fenced master writes while it holds, by every way there is, and not an instant
longer.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator

import psycopg2
import psycopg2.errors
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.membership import Member
from pmgsync.core.profile import Profile
from pmgsync.errors import UnreachableError
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.guard import ensure_guard, guarded_by, unguarded
from pmgsync.postgres.setup.lease import LeaseSession
from pmgsync.profile_file import load_profile
from tests.harness.database import Database
from tests.postgres.test_guard import SCHEMA, WRITES

OWN = Member(2, "gate2", "192.0.2.2", 1, 2, 3, b"c" * 32, b"s" * 32, "master")
OTHER = Member(1, "gate1", "192.0.2.1", 1, 2, 3, b"d" * 32, b"t" * 32, "master")
LONG_S = 600.0

CASCADES = """
SET search_path = public;
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE part (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE CASCADE);
INSERT INTO parent VALUES (1), (2);
INSERT INTO part VALUES (1, 1), (2, 2);
"""
CLOSED = "is the master of the cluster, but a majority"


@pytest.fixture
def master(server: EmbeddedPostgres) -> Database:
    """The database of a master that is fenced and has no lease yet."""
    database = Database(server)
    profile = load_profile("mirror")
    database.sql(SCHEMA)
    database.sql(CASCADES)
    database.provision(profile, cid=2)
    ensure_guard(database.dsn, profile, master=OWN, fenced=True)
    return database


@pytest.fixture
def mirror() -> Profile:
    return load_profile("mirror")


@pytest.fixture
def lease(master: Database) -> Iterator[LeaseSession]:
    with contextlib.closing(LeaseSession(master.dsn)) as session:
        yield session


@contextlib.contextmanager
def session(database: Database, *, isolation: str = "READ COMMITTED") -> Iterator[Connection]:
    with contextlib.closing(connect(database.dsn, application_name="test")) as connection:
        with connection.cursor() as cursor:
            cursor.execute(
                f"SET search_path = public; SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {isolation}"
            )
        connection.commit()
        yield connection


def run(connection: Connection, statement: str) -> None:
    with connection.cursor() as cursor:
        if "STDIN" in statement:
            cursor.copy_expert(statement, io.StringIO("7\tx\n"))
        else:
            cursor.execute(statement)


def until(seconds: float) -> float:
    return time.monotonic() + seconds


def test_it_starts_closed_opens_and_closes(master: Database, lease: LeaseSession) -> None:
    with session(master) as client:
        for statement in WRITES:
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED) as caught:
                run(client, statement)
            assert "pmgcm status" in (caught.value.diag.message_hint or "")
            client.rollback()
        lease.renew(until(LONG_S))
        for statement in WRITES:
            run(client, statement)
            client.rollback()
        run(client, "INSERT INTO plain VALUES (5, 'x')")
        client.commit()
        assert lease.shut()
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="gate2"):
            run(client, "INSERT INTO plain VALUES (6, 'x')")
        client.rollback()
        run(client, "INSERT INTO scratch VALUES (1)")
        client.commit()
    assert master.sql("SELECT count(*) FROM pmgsync.writer") == [(0,)]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("change", ["INSERT INTO plain VALUES (5)", "COPY plain FROM STDIN", "TRUNCATE plain CASCADE"])
def test_an_open_writer_cannot_commit_after_it_lapsed(
    master: Database, lease: LeaseSession, isolation: str, change: str
) -> None:
    lease.renew(until(LONG_S))
    before = master.sql("SELECT count(*) FROM public.plain")
    with session(master, isolation=isolation) as client:
        run(client, change)
        lease.shut()
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="cannot be committed any more"):
            client.commit()
        client.rollback()
        # And one that is old, but not older than the lease's renewal, can.
        lease.renew(until(LONG_S))
        run(client, "SELECT 1")
        run(client, change)
        lease.renew(until(LONG_S * 2))
        client.commit()
    assert master.sql("SELECT count(*) FROM public.plain") != before


def test_a_transaction_with_an_old_snapshot_sees_renewals(master: Database, lease: LeaseSession) -> None:
    lease.renew(until(1.0))
    end = until(1.0)
    with session(master, isolation="REPEATABLE READ") as client:
        run(client, "UPDATE plain SET v = 'new' WHERE id = 1")
        lease.renew(until(LONG_S))
        while time.monotonic() < end:
            time.sleep(0.05)
        run(client, "UPDATE plain SET v = 'newer' WHERE id = 1")
        client.commit()
    assert master.sql("SELECT v FROM public.plain WHERE id = 1") == [(b"newer",)]


def test_it_lapses_by_itself(master: Database, lease: LeaseSession) -> None:
    lease.renew(until(0.4))
    closed = until(0.4)
    with session(master) as client, session(master) as other:
        run(client, "INSERT INTO plain VALUES (5)")
        while time.monotonic() < closed:
            time.sleep(0.01)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED):
            run(other, "INSERT INTO plain VALUES (6)")
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED):
            client.commit()
    # What was told too late does not open.
    lease.renew(time.monotonic() - 1.0)
    with session(master) as client, pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        run(client, "INSERT INTO plain VALUES (6)")


def test_cascades_and_savepoints(master: Database, lease: LeaseSession) -> None:
    lease.renew(until(LONG_S))
    with session(master) as client:
        run(client, "SAVEPOINT s; DELETE FROM parent WHERE id = 1; ROLLBACK TO s; DELETE FROM parent WHERE id = 2")
        lease.shut()
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            client.commit()
        client.rollback()
        lease.renew(until(LONG_S))
        run(client, "SAVEPOINT s; DELETE FROM parent WHERE id = 1; ROLLBACK TO s; DELETE FROM parent WHERE id = 2")
        client.commit()
    assert master.sql("SELECT id FROM public.part") == [(1,)]


def test_closing_waits_for_no_lock(master: Database, lease: LeaseSession, mirror: Profile) -> None:
    """An open writer, and one who has locked the table against everybody, do not hold up a master that steps down."""
    lease.renew(until(LONG_S))
    with session(master) as client, session(master) as locker:
        run(client, "INSERT INTO plain VALUES (5)")
        run(locker, "LOCK TABLE root")
        began = time.monotonic()
        with contextlib.suppress(
            UnreachableError
        ):  # of tables that are locked it cannot be told yet whether they are guarded
            ensure_guard(master.dsn, mirror, master=OTHER, patience_s=0.0)
        assert guarded_by_of(master) == "gate1"
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=r"written by the master .*gate1"):
            client.commit()
        assert time.monotonic() - began < 30
    with session(master) as client, pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="gate1"):
        run(client, "DELETE FROM plain")


def test_an_old_snapshot_does_not_outlive_a_step_down(master: Database, lease: LeaseSession, mirror: Profile) -> None:
    lease.renew(until(LONG_S))
    with session(master, isolation="REPEATABLE READ") as client:
        run(client, "INSERT INTO plain VALUES (5)")
        ensure_guard(master.dsn, mirror, master=OTHER)
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            client.commit()


def test_who_applies_is_not_asked(master: Database) -> None:
    with contextlib.closing(connect(master.dsn, application_name="test", replica=True)) as connection:
        run(connection, "INSERT INTO public.plain VALUES (5)")
        connection.commit()


def test_a_clock_that_was_set_back_does_not_open_what_is_closed(master: Database, lease: LeaseSession) -> None:
    """The server's clock cannot be set here; a lease that was written in what is then the future is the same."""
    lease.renew(until(LONG_S))
    value = master.sql("SELECT last_value FROM pmgsync.lease")[0][0]
    master.sql(f"SELECT setval('pmgsync.lease', {value} + (3600000::bigint << 20))")
    with session(master) as client, pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED):
        run(client, "DELETE FROM plain")


def test_operators_of_a_user_do_not_open_it(master: Database, lease: LeaseSession) -> None:
    master.sql(
        "CREATE SCHEMA theirs; SET search_path = theirs, pg_catalog;"
        "CREATE FUNCTION yes(float8, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true';"
        "CREATE OPERATOR < (FUNCTION = yes, LEFTARG = float8, RIGHTARG = bigint);"
        "CREATE OPERATOR >= (FUNCTION = yes, LEFTARG = float8, RIGHTARG = bigint);"
        "CREATE FUNCTION pg_sequence_last_value(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT 9223372036854775807';"
        "CREATE DOMAIN text AS pg_catalog.text CHECK (false)"
    )
    with session(master) as client:
        run(client, "SET search_path = theirs, pg_catalog, public")
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED):
            run(client, "INSERT INTO plain VALUES (5)")
        client.rollback()
        lease.renew(until(LONG_S))
        run(client, "SET search_path = theirs, pg_catalog, public")
        run(client, "INSERT INTO plain VALUES (5)")
        lease.shut()
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="cannot be committed any more"):
            client.commit()


def test_a_new_table_is_closed_too(master: Database, lease: LeaseSession) -> None:
    with session(master) as client:
        run(client, "CREATE TABLE later (id int)")
        client.commit()
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match="later"):
            run(client, "INSERT INTO later VALUES (1)")
        client.rollback()
        lease.renew(until(LONG_S))
        run(client, "INSERT INTO later VALUES (1)")
        client.commit()


def test_many_writers_leave_nothing_behind(master: Database, lease: LeaseSession) -> None:
    lease.renew(until(LONG_S))

    def write(number: int) -> None:
        with session(master) as client:
            for step in range(25):
                run(client, f"INSERT INTO plain VALUES ({1000 * number + step}); INSERT INTO root VALUES (1)")
                client.commit() if step % 5 else client.rollback()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert master.sql("SELECT count(*) FROM public.plain WHERE id > 999") == [(60,)]
    assert master.sql("SELECT count(*) FROM pmgsync.writer") == [(0,)]


def test_without_a_fence_everything_is_as_before(master: Database, mirror: Profile) -> None:
    ensure_guard(master.dsn, mirror, master=None)
    with contextlib.closing(connect(master.dsn, application_name="test")) as connection:
        assert guarded_by(connection) is None
        assert unguarded(connection)
    with session(master) as client:
        run(client, "INSERT INTO plain VALUES (5)")
        client.commit()


@pytest.mark.usefixtures("pg_bindir")
def test_a_crash_closes(mirror: Profile) -> None:
    with EmbeddedPostgres() as server:
        crash_closes(server, mirror)


def crash_closes(server: EmbeddedPostgres, mirror: Profile) -> None:
    database = Database(server)
    database.sql(SCHEMA)
    database.provision(mirror, cid=2)
    ensure_guard(database.dsn, mirror, master=OWN, fenced=True)
    with contextlib.closing(LeaseSession(database.dsn)) as lease:
        lease.renew(until(LONG_S))
    with session(database) as client:
        run(client, "INSERT INTO plain VALUES (5)")
        client.commit()
    server.kill()
    server.start()
    with session(database) as client, pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=CLOSED):
        run(client, "INSERT INTO plain VALUES (6)")
    with contextlib.closing(LeaseSession(database.dsn)) as lease:
        lease.renew(until(LONG_S))
    with session(database) as client:
        run(client, "INSERT INTO plain VALUES (6)")
        client.commit()


def guarded_by_of(database: Database) -> str | None:
    with contextlib.closing(connect(database.dsn, application_name="test")) as connection:
        return guarded_by(connection)
