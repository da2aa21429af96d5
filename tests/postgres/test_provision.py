"""Provisioning on real servers: what it makes, what it refuses, and that nothing is ever left half made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pmgsync
from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.findings import raise_for
from pmgsync.core.profile import Profile
from pmgsync.errors import MembershipError, PmgsyncError, PreflightError
from pmgsync.postgres.setup.preflight import check_server
from pmgsync.postgres.setup.provision import deprovision
from pmgsync.profile_file import load_profile
from tests.harness.cluster import eventually
from tests.harness.database import CLUSTER, GATEWAY, Database

NOTHING = (0, 0, 0, 0, 0)


@pytest.fixture
def app(server: EmbeddedPostgres) -> Database:
    database = Database(server)
    database.sql("CREATE TABLE public.keyed (id int PRIMARY KEY, v text)")
    database.sql("CREATE TABLE public.loose (v text)")
    return database


@pytest.fixture
def mirror() -> Profile:
    return load_profile("mirror")


# -- what it makes -----------------------------------------------------------------------------------------------------


def test_the_gateways_database(server: EmbeddedPostgres) -> None:
    database = Database(server, "gate", "SQL_ASCII")
    database.sql(GATEWAY.read_bytes())
    database.sql("INSERT INTO public.localstat (time, cid, mtime) VALUES (1, 0, 1), (1, 7, 1)")
    profile = load_profile("pmg")
    with database.connection() as connection:
        findings = check_server(connection, profile)
    raise_for(findings)
    assert [finding.problem for finding in findings if finding.problem] == [
        "tables without a usable key are given REPLICA IDENTITY FULL: public.cmsreceivers, public.creceivers"
    ]
    made = database.provision(profile)
    assert database.facts() == made
    assert (made.cid, made.cluster, made.slot, made.publication) == (1, CLUSTER, "pmgsync", "pmgsync")
    assert made.incarnation > 0
    assert database.sql("SELECT cid FROM public.localstat ORDER BY cid") == [(1,), (7,)]
    published = {name for (name,) in database.sql("SELECT tablename::text FROM pg_publication_tables")}
    assert len(published) == 17
    assert not published & {b"clusterinfo", b"statinfo"}
    assert database.sql("SELECT * FROM pmgsync.position") == []
    # Taking rows over is not in the chain: the node's own updates after it are.
    database.sql("UPDATE public.localstat SET mtime = 2 WHERE cid = 1")
    options = "'proto_version', '1', 'publication_names', 'pmgsync'"
    messages = database.sql(f"SELECT data FROM pg_logical_slot_peek_binary_changes('pmgsync', NULL, NULL, {options})")
    transactions = b"".join(bytes(data)[:1] for (data,) in messages).split(b"C")[:-1]
    assert [kinds.replace(b"R", b"") for kinds in transactions if b"O" not in kinds] == [b"BU"]
    deprovision(database.dsn)
    assert database.left() == NOTHING
    assert database.facts() is None


def test_replica_identities_come_back_as_they_were(server: EmbeddedPostgres, app: Database, mirror: Profile) -> None:
    app.sql("CREATE TABLE public.late (id int PRIMARY KEY DEFERRABLE)")
    app.sql("CREATE TABLE public.none (id int PRIMARY KEY)")
    app.sql("ALTER TABLE public.none REPLICA IDENTITY NOTHING")
    app.sql("CREATE TABLE public.full (id int)")
    app.sql("ALTER TABLE public.full REPLICA IDENTITY FULL")
    app.sql("CREATE TABLE public.odd (id int NOT NULL UNIQUE)")
    app.sql("ALTER TABLE public.odd REPLICA IDENTITY USING INDEX odd_id_key")
    app.sql("CREATE UNLOGGED TABLE public.fast (id int)")
    query = "SELECT relname::text, relreplident::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 2200"
    before = dict(app.sql(query))
    app.provision(mirror)
    during = dict(app.sql(query))
    full = {name for name, identity in during.items() if identity == b"f"}
    assert full == {b"loose", b"late", b"none", b"full"}
    # What worked on the node before must not fail because it is published.
    for name in full | {b"odd", b"keyed"}:
        app.sql(b"UPDATE public.%s SET %s = NULL WHERE false" % (name, b"v" if name in {b"loose", b"keyed"} else b"id"))
    deprovision(app.dsn)
    assert dict(app.sql(query)) == before
    deprovision(app.dsn)


def test_create_forgets_positions_and_join_keeps_them(app: Database, mirror: Profile) -> None:
    app.provision(mirror)
    app.sql("INSERT INTO pmgsync.position (origin, incarnation, lsn) VALUES (5, 1, '0/1')")
    app.sql("DELETE FROM pmgsync.node")
    app.provision(mirror, cid=2, needs_snapshot=False, take_over_cid0=False)
    assert app.sql("SELECT origin FROM pmgsync.position") == [(5,)]
    app.sql("DELETE FROM pmgsync.node")
    assert app.provision(mirror).needs_snapshot
    assert app.sql("SELECT origin FROM pmgsync.position") == []


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_second_time_is_refused(app: Database, mirror: Profile) -> None:
    made = app.provision(mirror)
    with pytest.raises(MembershipError, match="cluster already defined"):
        app.provision(mirror)
    assert app.facts() == made


def test_everything_that_is_wrong_is_said_at_once(pg_bindir: str) -> None:
    with EmbeddedPostgres(
        settings={"wal_level": "replica", "max_replication_slots": "1", "max_wal_senders": "1"}
    ) as bad:
        database = Database(bad)
        database.sql("CREATE TABLE public.rule (id int)")
        database.sql("CREATE TABLE public.cmsreceivers (ticketid int)")
        database.sql("CREATE TABLE public.cmailstore (cid int, rid int, id int)")
        database.sql("CREATE UNLOGGED TABLE public.object (id int PRIMARY KEY)")
        database.sql("CREATE TABLE public.cgreylist (id int, twice int GENERATED ALWAYS AS (id) STORED PRIMARY KEY)")
        database.sql("CREATE ROLE plain LOGIN")
        with database.connection() as connection:
            connection.cursor().execute("SET ROLE plain")
            findings = check_server(connection, load_profile("pmg"))
        with pytest.raises(PreflightError) as caught:
            raise_for(findings)
        text = str(caught.value)
        for part in (
            "wal_level is replica: set wal_level = logical and restart PostgreSQL",
            "1 of 1 replication slots are free, 2 are needed: set max_replication_slots = 2",
            "1 of 1 walsenders are free, 2 are needed",
            "the database user plain is not a superuser",
            "rulegroup, objectgroup, attribut",
            "the table cmsreceivers lacks columns that the profile refers to: cmailstore_cid",
            "the table cmailstore lacks columns that the profile refers to: file",
            "the table object is unlogged",
            "the table cgreylist would be merged by generated columns: twice",
        ):
            assert part in text


def test_a_slot_of_another_database_is_left_alone(server: EmbeddedPostgres, app: Database, mirror: Profile) -> None:
    other = Database(server, "other")
    other.sql("SELECT pg_create_logical_replication_slot('pmgsync', 'pgoutput')")
    with app.connection() as connection:
        bad = [finding.problem for finding in check_server(connection, mirror) if not finding.ok]
    assert bad == ["the replication slot pmgsync belongs to the database other of the same server"]
    with pytest.raises(PreflightError, match="belongs to the database other"):
        app.provision(mirror)
    assert app.left() == (1, 0, 0, 0, 0)


# -- nothing half made -------------------------------------------------------------------------------------------------


def test_an_error_in_any_step_leaves_nothing(server: EmbeddedPostgres, app: Database) -> None:
    profile = load_profile("pmg")
    app.sql(GATEWAY.read_bytes())
    app.sql("INSERT INTO public.localstat (time, cid, mtime) VALUES (1, 0, 1)")
    # The last step fails: a row of CID 0 cannot become the node's.
    app.sql("ALTER TABLE public.localstat ADD CHECK (cid = 0)")
    with pytest.raises(PmgsyncError, match="localstat"):
        app.provision(profile)
    assert app.left() == NOTHING
    app.sql("ALTER TABLE public.localstat DROP CONSTRAINT localstat_cid_check")
    app.provision(profile)


@pytest.mark.parametrize("prepared", [False, True])
def test_waiting_names_who_is_waited_for(server: EmbeddedPostgres, mirror: Profile, prepared: bool) -> None:
    app = Database(server)
    app.sql("CREATE TABLE public.keyed (id int PRIMARY KEY)")
    with app.connection() as holder:
        holder.cursor().execute("BEGIN; INSERT INTO public.keyed VALUES (1)")
        if prepared:
            holder.cursor().execute("PREPARE TRANSACTION 'gift'")
        told = []

        def progress(text: str) -> None:
            told.append(text)
            holder.cursor().execute("COMMIT PREPARED 'gift'" if prepared else "COMMIT")

        app.provision(mirror, progress=progress)
        who = "prepared transaction 'gift'" if prepared else f"process {holder.info.backend_pid} "
        assert len(told) == 1
        assert who in told[0]


_CHILD = """
import signal, sys
from pmgsync.postgres.setup.provision import provision
from pmgsync.profile_file import load_profile
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
provision(sys.argv[1], load_profile("mirror"), cid=1, cluster=b"c" * 16, needs_snapshot=True, take_over_cid0=True,
          progress=lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_it_waits_leaves_nothing(app: Database, mirror: Profile, number: signal.Signals) -> None:
    with app.connection() as holder:
        holder.cursor().execute("BEGIN; INSERT INTO public.keyed VALUES (1)")
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, app.dsn],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(pmgsync.__file__).parent.parent)},
        )
        assert child.stdout is not None
        with child.stdout:
            assert b"waiting for" in child.stdout.readline()
            child.send_signal(number)
            assert child.wait(20) != 0
        if number == signal.SIGKILL:
            # The server notices by itself that nobody waits for the slot any more.
            eventually(lambda: app.left()[0] == 0, what="the slot of a killed process is gone")
        else:
            assert app.left() == NOTHING
    assert app.facts() is None
    app.provision(mirror)
    assert app.left()[0] == 1


@pytest.mark.parametrize("step", range(1, 18))
def test_a_kill_after_any_statement_is_made_good_by_the_next_attempt(
    app: Database, mirror: Profile, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"""
import os, pmgsync.postgres.setup.provision as p
real, count = p._execute, [0]
def counted(*arguments):
    real(*arguments)
    count[0] += 1
    if count[0] == {step}:
        os.kill(os.getpid(), 9)
p._execute = counted
"""
        + _CHILD
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pmgsync.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, app.dsn], env=environment, check=False, capture_output=True, timeout=60
    )
    if done.returncode == 0:
        assert app.facts() is not None
        return
    assert done.returncode == -signal.SIGKILL, done.stderr
    complete = eventually(lambda: (app.facts(),))[0] is not None
    if complete:
        with pytest.raises(MembershipError):
            app.provision(mirror)
        deprovision(app.dsn)
    app.provision(mirror)
    assert app.left() == (1, 1, 1, 0, 1)
    deprovision(app.dsn)
    assert app.left() == NOTHING


def test_a_slot_in_use_is_taken_from_its_user(app: Database, mirror: Profile) -> None:
    from pmgsync.postgres.wal.slot_reader import SlotReader

    made = app.provision(mirror)
    reader = SlotReader(app.dsn, slot=made.slot, publication=made.publication, start_lsn=made.start + 1)
    try:
        deprovision(app.dsn)
    finally:
        reader.close()
    assert app.left() == NOTHING
