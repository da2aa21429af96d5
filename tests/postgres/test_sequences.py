"""Sequences across a real cluster: the copies stay ahead of the master's, in every direction, and follow it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.ceilings import MIN_MARGIN, Ceilings, Sequence, Value
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.postgres.setup.sequence_values import follow, pass_rows, publish_sequences, read_sequences
from pmgsync.profile_file import load_profile
from tests.harness.cluster import Cluster, eventually
from tests.harness.database import Database
from tests.harness.server import Pair, make_profile

SCHEMA = """
CREATE TABLE public.serial (id serial PRIMARY KEY, v text);
CREATE TABLE public.always (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
CREATE SEQUENCE public.down INCREMENT -5 MAXVALUE 1000 MINVALUE -1000000 START 500;
CREATE SEQUENCE public.round MAXVALUE 64 CYCLE CACHE 4;
CREATE SEQUENCE public."O'dd.""näme" START 7;
CREATE SEQUENCE public.small AS smallint;
CREATE UNLOGGED TABLE public.fast (id serial);
"""


@pytest.fixture
def mirror() -> Profile:
    return load_profile("mirror")


def names(found: dict[tuple[bytes, bytes], Sequence]) -> dict[str, Sequence]:
    return {name.decode(): sequence for (_, name), sequence in found.items()}


def test_what_is_read(server: EmbeddedPostgres, mirror: Profile) -> None:
    database = Database(server)
    database.sql(SCHEMA.encode())
    with database.connection() as connection:
        found = names(read_sequences(connection, mirror))
        assert set(found) >= {"serial_id_seq", "always_id_seq", "down", "round", "O'dd.\"näme", "small"}
        assert found["down"] == Sequence(-5, -1000000, 1000, False, 505)
        assert found["O'dd.\"näme"].last == 6
        connection.cursor().execute("SELECT nextval('public.round'), nextval('public.down')")
        # With a cache, what a session holds counts as handed out.
        found = names(read_sequences(connection, mirror))
        assert (found["round"].last, found["down"].last) == (4, 500)
        with database.connection() as other:
            other.cursor().execute("BEGIN; ALTER SEQUENCE public.down RESTART; DROP SEQUENCE public.round")
            found = names(read_sequences(connection, mirror))
            assert "round" not in found
            assert "serial_id_seq" in found
            other.cursor().execute("ROLLBACK")


def test_which_follow(server: EmbeddedPostgres) -> None:
    database = Database(server)
    database.sql(SCHEMA.encode())
    rules = (
        TableRule("public", "serial", Policy.MIRROR),
        TableRule("public", "always", Policy.OWNED, owner="id"),
    )
    profile = make_profile(*rules, all_tables=False)
    local = make_profile(
        TableRule("public", "serial", Policy.MIRROR, local_columns=frozenset({"id"})), all_tables=False
    )
    with database.connection() as connection:
        assert set(names(read_sequences(connection, profile))) == {"serial_id_seq"}
        assert read_sequences(connection, local) == {}


def test_a_copy_moves_forward_only_unless_exact(server: EmbeddedPostgres) -> None:
    database = Database(server)
    database.sql(SCHEMA.encode())
    with database.connection() as connection, connection.cursor() as cursor:

        def last(name: str) -> Any:
            cursor.execute(f"SELECT pg_sequence_last_value('public.{name}')")
            return cursor.fetchone()[0]  # type: ignore[index]

        def set_to(name: str, value: int, exact: bool = False) -> list[str]:
            return follow(cursor, [Value(b"public", name.encode(), value, exact)])

        assert set_to("small", 100) == []
        assert set_to("small", 50) == []
        assert last("small") == 100
        set_to("small", 50, exact=True)
        assert last("small") == 50
        set_to("small", 40_000)  # beyond its end: it has another type here
        assert last("small") == 50
        set_to("down", 100)
        set_to("down", 200)
        assert last("down") == 100
        assert set_to("nowhere", 1) == ["public.nowhere"]
        assert follow(cursor, []) == []


def test_a_node_that_becomes_master_passes_its_rows(server: EmbeddedPostgres, mirror: Profile) -> None:
    database = Database(server)
    database.sql(SCHEMA.encode())
    database.sql("INSERT INTO public.serial VALUES (500), (70)")
    with database.connection() as connection:
        assert pass_rows(connection, mirror) == ["public.serial_id_seq"]
        assert pass_rows(connection, mirror) == []
    assert database.sql("INSERT INTO public.serial (v) VALUES ('') RETURNING id") == [(501,)]


def test_through_a_chain(server: EmbeddedPostgres) -> None:
    pair = Pair(server, make_profile())
    with contextlib.closing(pair):
        pair.setup(SCHEMA, watched=True)
        pair.run("DROP SEQUENCE public.small", on=pair.target)
        pair.run("INSERT INTO public.serial (v) VALUES ('a')")
        ceilings = Ceilings()
        assert publish_sequences(pair.source, pair.profile, ceilings) > 4
        assert publish_sequences(pair.source, pair.profile, ceilings) == 0
        pair.run("SELECT pg_logical_emit_message(true, 'pmgsync.later', 'x')")
        pair.run("SELECT pg_logical_emit_message(true, 'pmgsync', 'barrier')")
        applier = pair.apply()
        assert list(applier.stats.warnings) == ["the sequence public.small of the master is not here"]
        after = pair.run("SELECT nextval('public.serial_id_seq'), nextval('public.down')", on=pair.target)
        assert after == [(1 + MIN_MARGIN + 1, 505 - 5 * MIN_MARGIN - 5)]
        # Restarted with its table: the copy follows, and is ahead again.
        pair.run("TRUNCATE public.serial RESTART IDENTITY")
        assert publish_sequences(pair.source, pair.profile, ceilings) == 1
        pair.apply()
        assert pair.run("SELECT nextval('public.serial_id_seq')", on=pair.target) == [(MIN_MARGIN + 1,)]


@pytest.mark.cluster
def test_a_cluster_is_guarded_and_its_sequences_are_ahead(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(schema="CREATE TABLE serial (id serial PRIMARY KEY, v text)")
    master, slave = cluster.nodes
    last = "SELECT coalesce(pg_sequence_last_value('public.serial_id_seq'), 0)"
    for count in (1, 3000, 20_000):
        master.sql("INSERT INTO serial (v) SELECT 'x' FROM generate_series(1, %s)", (count,))
        used = master.sql(last)[0][0]

        def passed(used: int = used) -> bool:
            return bool(slave.sql(last)[0][0] >= used + 100)

        eventually(passed, what=f"the copy passes {used}")
    eventually(
        lambda: slave.sql("SELECT count(*) FROM pg_trigger WHERE tgname = 'pmgsync_guard'") == [(1,)], what="guarded"
    )
    with pytest.raises(Exception, match=r"node1 \(127\.0\.0\.1\)"):
        slave.sql("DELETE FROM serial")
    master.sql("UPDATE serial SET v = 'y' WHERE id = 1")
    cluster.wait()
    cluster.assert_equal(["serial"])
    assert master.sql("SELECT count(*) FROM pmgsync.guard") == [(0,)]
    for node in cluster.nodes:
        done = node.pmgcm("doctor", check=False)
        assert done.returncode == 0, done.stdout
        assert "FAIL" not in done.stdout
    slave.sql("DROP EVENT TRIGGER pmgsync_watch_drop")
    slave.kill("agent")
    slave.sql("ALTER TABLE serial DISABLE TRIGGER pmgsync_guard")
    done = slave.pmgcm("doctor", "--json", check=False)
    assert done.returncode == 1
    for text in ("nobody reads the replication slot", "can be written here: public.serial"):
        assert text in done.stdout
    slave.start()
    eventually(lambda: slave.pmgcm("doctor", check=False).returncode == 0, what="the agent put it right")
