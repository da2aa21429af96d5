"""Snapshots of a whole database and of one chain, put in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.members import Member
from pmgsync.core.positions import LAST
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, PreflightError, ProtocolError
from pmgsync.postgres.copy.database_restore import ChainRestore, DatabaseRestore
from pmgsync.postgres.copy.dump import plain_sql
from pmgsync.postgres.copy.take import Piece, take_chain_snapshot, take_database_snapshot
from pmgsync.postgres.session import quote_literal
from pmgsync.postgres.setup.facts import database_facts
from pmgsync.postgres.setup.guard import ensure_guard
from pmgsync.postgres.setup.provision import provision
from pmgsync.profile_file import load_profile
from tests.harness.database import CLUSTER, GATEWAY, Database
from tests.harness.servers import SharedServers

ALL_BYTES = bytes(range(1, 256))


@pytest.fixture
def gateway() -> Profile:
    return load_profile("pmg")


@pytest.fixture
def other_server(pg_bindir: str, shared_servers: SharedServers) -> Iterator[EmbeddedPostgres]:
    """The receiving node's."""
    shared = shared_servers.get("receiving")
    yield shared.server
    shared.clean()


def facts_of(database: Database) -> dict[str, Any]:
    with database.connection() as connection:
        return database_facts(connection)


def copied(restore: DatabaseRestore, pieces: Iterator[Piece]) -> dict[str, Any]:
    """Feed a snapshot into a restore and return the result."""
    for piece, attachment in pieces:
        if piece["kind"] == "result":
            restore.finish(piece)
            return piece
        assert attachment is None or len(attachment) <= 1 << 20
        restore.feed(piece, attachment)
    raise AssertionError("no result")


# -- the whole database ------------------------------------------------------------------------------------------------

EVERYTHING = """
CREATE SCHEMA sales;
CREATE TABLE sales.orders (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, twice text GENERATED ALWAYS AS (v || v) STORED);
INSERT INTO sales.orders (v) SELECT 'v' || g FROM generate_series(1, 1000) AS g;
CREATE TABLE sales.lines (
    order_id int REFERENCES sales.orders (id) ON DELETE CASCADE, n numeric, d timestamptz, f float8);
INSERT INTO sales.lines VALUES
    (1, 1.0, '2024-02-29 12:00+02', 0.1), (1, 1.00, 'infinity', 'NaN'), (NULL, NULL, NULL, NULL);
CREATE TABLE sales.parted (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE sales.parted1 PARTITION OF sales.parted FOR VALUES FROM (0) TO (10);
CREATE TABLE sales.parted2 PARTITION OF sales.parted FOR VALUES FROM (10) TO (20);
INSERT INTO sales.parted SELECT g, 'p' FROM generate_series(0, 19) AS g;
CREATE UNLOGGED TABLE sales.fast (id int);
INSERT INTO sales.fast VALUES (1);
CREATE TABLE sales.nothing ();
INSERT INTO sales.nothing DEFAULT VALUES;
CREATE TABLE sales.huge (v text);
INSERT INTO sales.huge SELECT repeat('huge', 1000000);
CREATE VIEW sales.totals AS SELECT order_id, sum(n) FROM sales.lines GROUP BY 1;
CREATE SEQUENCE sales.numbers;
SELECT nextval('sales.numbers') FROM generate_series(1, 42);
CREATE FUNCTION sales.noisy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN /*
SET transaction_timeout = 0;
\\restrict in a function is not the dump's
*/ RAISE 'must not fire while rows are loaded'; END $$;
CREATE TRIGGER noisy BEFORE INSERT ON sales.huge FOR EACH ROW EXECUTE FUNCTION sales.noisy();
ALTER DATABASE app SET search_path TO sales, public;
ALTER DATABASE app SET work_mem TO '7MB';
"""


CONTENT = """
SELECT (SELECT string_agg(o::text, ';' ORDER BY id) FROM sales.orders AS o),
       (SELECT string_agg(l::text, ';' ORDER BY l::text) FROM sales.lines AS l),
       (SELECT string_agg(tableoid::regclass || p::text, ';' ORDER BY id) FROM sales.parted AS p),
       (SELECT count(*) FROM sales.nothing), (SELECT md5(v) FROM sales.huge), (SELECT last_value FROM sales.numbers),
       (SELECT prosrc FROM pg_proc WHERE proname = 'noisy'), (SELECT count(*) FROM pg_trigger),
       (SELECT string_agg(s, ';') FROM pg_db_role_setting, unnest(setconfig) AS s)
"""


def test_a_whole_database_is_restored_and_swapped_in(
    server: EmbeddedPostgres, other_server: EmbeddedPostgres, mirror: Profile
) -> None:
    source, target = Database(server), Database(other_server)
    source.sql(EVERYTHING)
    target.sql("CREATE TABLE public.old (id int)")
    made = source.provision(mirror)
    restore = DatabaseRestore(target.dsn, facts_of(source))
    restore.begin()
    result = copied(restore, take_database_snapshot(source.dsn, mirror, own=(1, made.incarnation)))
    assert restore.plan["tables"] == 6
    assert (restore.rows, result["rows"]) == (1025, 1025)
    # Provisioned beside the old one, so that what is swapped in is a node at once.
    joined = provision(restore.dsn, mirror, cid=2, cluster=CLUSTER, needs_snapshot=False, take_over_cid0=False)
    assert target.sql("SELECT to_regclass('public.old') IS NOT NULL") == [(True,)]
    with target.connection() as bystander:
        restore.swap()
        assert bystander.info.transaction_status is not None
    assert target.facts() == joined
    assert target.sql(CONTENT) == source.sql(CONTENT)
    assert target.sql("SELECT count(*) FROM sales.fast") == [(0,)]
    assert target.sql("INSERT INTO sales.orders (v) VALUES ('next') RETURNING id") == [(1001,)]
    incarnation, lsn, part = result["vector"][1]
    assert target.sql("SELECT origin, incarnation, (lsn - '0/0')::bigint, part FROM pmgsync.position") == [
        (1, incarnation, lsn, part)
    ]
    names = target.sql("SELECT datname FROM pg_database WHERE datname LIKE 'app%'")
    assert names == [(b"app",)]
    assert target.left()[:3] == (1, 1, 1)


def test_the_copy_of_a_master_that_is_fenced_is_guarded_as_a_slave(
    server: EmbeddedPostgres, other_server: EmbeddedPostgres, mirror: Profile
) -> None:
    source, target = Database(server), Database(other_server)
    source.sql("CREATE TABLE public.t (id int PRIMARY KEY)")
    made = source.provision(mirror)
    master = Member(1, "gate1", "192.0.2.1", 1, 2, 3, b"c" * 32, b"s" * 32, "master")
    ensure_guard(source.dsn, mirror, master=master, fenced=True)
    restore = DatabaseRestore(target.dsn, facts_of(source))
    restore.begin()
    copied(restore, take_database_snapshot(source.dsn, mirror, own=(1, made.incarnation)))
    provision(restore.dsn, mirror, cid=2, cluster=CLUSTER, needs_snapshot=False, take_over_cid0=False)
    ensure_guard(restore.dsn, mirror, master=master)
    restore.swap()
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction, match=r"gate1 \(192\.0\.2\.1\)"):
        target.sql("INSERT INTO public.t VALUES (1)")
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        target.sql("CREATE TABLE public.new (id int); INSERT INTO public.new VALUES (1)")


def test_any_bytes_and_local_columns(
    server: EmbeddedPostgres, other_server: EmbeddedPostgres, gateway: Profile
) -> None:
    source, target = Database(server, "gate", "SQL_ASCII"), Database(other_server, "gate", "SQL_ASCII")
    source.sql(GATEWAY.read_bytes())
    made = source.provision(gateway)
    for byte in range(0x80, 0x100):
        text = quote_literal(b"a\\\t" + bytes([byte]) + b"\n")
        source.sql(
            b"INSERT INTO public.cmailstore (cid, rid, id, time, qtype, bytes, spamlevel, info, sender, header, file) "
            b"VALUES (1, %d, %d, 1, 'V', 1, 1, %s, %s, %s, 'f')" % (byte, 5000 + byte, text, text, text)
        )
    source.sql(
        b"INSERT INTO public.userprefs VALUES (%s, 'n', %s, 1)" % (quote_literal(ALL_BYTES), quote_literal(ALL_BYTES))
    )
    source.sql("INSERT INTO public.rule (name, priority) VALUES ('r', 1); INSERT INTO public.statinfo VALUES ('here')")
    restore = DatabaseRestore(target.dsn, facts_of(source))
    restore.begin()
    copied(restore, take_database_snapshot(source.dsn, gateway, own=(1, made.incarnation)))
    restore.swap()
    query = "SELECT rid, info, sender, header FROM public.cmailstore ORDER BY rid"
    assert target.sql(query) == source.sql(query)
    assert len(target.sql(query)) == 128
    assert target.sql("SELECT pmail, data FROM public.userprefs") == [(ALL_BYTES, ALL_BYTES)]
    # The serial of cmailstore is each node's own; that of the rules goes on where the master's is.
    assert target.sql("SELECT min(id), max(id) FROM public.cmailstore") == [(1, 128)]
    assert target.sql("INSERT INTO public.rule (priority) VALUES (1) RETURNING id") == [(2,)]
    assert target.sql("SELECT count(*) FROM public.statinfo") == [(0,)]
    assert target.sql("SELECT count(*) FROM pmgsync.replica_identity") == [(2,)]


def test_an_interrupted_restore_leaves_the_old_database(
    server: EmbeddedPostgres, other_server: EmbeddedPostgres, mirror: Profile
) -> None:
    source, target = Database(server), Database(other_server)
    source.sql("CREATE TABLE public.t (id int PRIMARY KEY); INSERT INTO public.t SELECT generate_series(1, 100)")
    target.sql("CREATE TABLE public.old (id int)")
    made = source.provision(mirror)
    facts = facts_of(source)

    def names() -> list[Any]:
        return target.sql("SELECT datname FROM pg_database WHERE datname LIKE 'app%' ORDER BY 1")

    half = DatabaseRestore(target.dsn, facts)
    half.begin()
    for piece, attachment in take_database_snapshot(source.dsn, mirror, own=(1, made.incarnation)):
        half.feed(piece, attachment)
        if piece["kind"] == "rows":
            break
    assert len(names()) == 2
    # Neither closed nor abandoned, as after kill -9; what is there of it belongs to nobody.
    again = DatabaseRestore(target.dsn, facts)
    again.begin()
    again.feed({"kind": "plan"}, None)
    again.feed({"kind": "schema", "section": "pre-data"}, b"CREATE TABLE public.t (id ")
    again.feed({"kind": "schema", "section": "pre-data"}, b"int)")
    with pytest.raises(ProtocolError, match="where none can stand"):
        again.feed({"kind": "rows"}, b"1\n")
    again.feed({"kind": "table", "schema": b"public", "table": b"t", "columns": [b"id"]}, None)
    again.feed({"kind": "rows"}, b"1\nnot a number\n")
    with pytest.raises(PmgsyncError, match=r"public\.t.*not a number"):
        again.feed({"kind": "table-end", "rows": 2}, None)
    again.abandon()
    assert names() == [(b"app",)]
    half.abandon()
    short = DatabaseRestore(target.dsn, facts)
    short.begin()
    short.feed({"kind": "plan"}, None)
    with pytest.raises(ProtocolError, match="after 0 of 5 rows"):
        short.finish({"vector": {1: [1, 1, LAST]}, "rows": 5})
    with pytest.raises(ProtocolError, match="vector"):
        short.finish({"vector": {"1": [1, 1, LAST]}, "rows": 0})
    short.abandon()
    assert target.sql("SELECT to_regclass('public.old') IS NOT NULL") == [(True,)]
    whole = DatabaseRestore(target.dsn, facts)
    whole.begin()
    copied(whole, take_database_snapshot(source.dsn, mirror, own=(1, made.incarnation)))
    whole.swap()
    assert target.sql("SELECT count(*) FROM public.t") == [(100,)]
    assert names() == [(b"app",)]


def test_what_the_receiving_server_lacks_is_said(other_server: EmbeddedPostgres, server: EmbeddedPostgres) -> None:
    source, target = Database(server), Database(other_server)
    source.sql("CREATE ROLE clerk; CREATE TABLE public.t (id int); GRANT SELECT ON public.t TO clerk")
    made = source.provision(load_profile("mirror"))
    restore = DatabaseRestore(target.dsn, facts_of(source))
    restore.begin()
    with pytest.raises(PreflightError, match=r"clerk.*CREATE ROLE"):
        copied(restore, take_database_snapshot(source.dsn, load_profile("mirror"), own=(1, made.incarnation)))
    restore.abandon()
    restore = DatabaseRestore(target.dsn, facts_of(source) | {"collate": "xx_XX.utf8", "ctype": "xx_XX.utf8"})
    with pytest.raises(PreflightError, match=r"xx_XX\.utf8.*locale-gen"):
        restore.begin()


def test_a_dump_is_cleaned_of_what_is_not_sql_at_its_ends_only() -> None:
    middle = b"\nSELECT pg_catalog.set_config('search_path', '', false);\n\\restrict x\nSET transaction_timeout = 0;\n"
    dump = (
        b"--\n\n\\restrict token\n\nSET lock_timeout = 0;\nSET transaction_timeout = 0;\n" + middle
        + b"--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict token\n\n"
    )  # fmt: skip
    assert plain_sql(dump) == b"--\n\n\n\nSET lock_timeout = 0;\n\n" + middle + b"--"


# -- one chain ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_restored_into_a_database_in_use(
    server: EmbeddedPostgres, other_server: EmbeddedPostgres, gateway: Profile
) -> None:
    source, target = Database(server, "gate", "SQL_ASCII"), Database(other_server, "gate", "SQL_ASCII")
    for database, cid in ((source, 1), (target, 2)):
        database.sql(GATEWAY.read_bytes())
        database.provision(gateway, cid=cid)
    receiver = "INSERT INTO public.cmsreceivers VALUES"
    source.sql(
        "INSERT INTO public.objectgroup (name, class) VALUES ('new', 'x');"
        "INSERT INTO public.localstat (time, cid, mtime) VALUES (1, 1, 1), (1, 2, 1), (1, 9, 1);"
        "INSERT INTO public.cgreylist VALUES ('a', 'b', 'c', 'i', 5, 5, 5, 5, 5, 1, 1),"
        "('x', 'b', 'c', 'i', 1, 1, 1, 1, 1, 1, 1);"
        f"{receiver} (1, 1, 'p', 'r', 1, 'N', 'S', 20, 5),"
        "(1, 2, 'p', 'r', 1, 'N', 'N', 0, 5), (2, 9, 'p', 'r', 1, 'D', 'N', 0, 5)"
    )
    target.sql(
        "INSERT INTO public.objectgroup (name, class) VALUES ('stale', 'x'), ('old', 'x');"
        "INSERT INTO public.localstat (time, cid, mtime) VALUES (7, 1, 1), (1, 2, 77), (7, 9, 1);"
        "INSERT INTO public.cgreylist VALUES ('a', 'b', 'c', 'i', 1, 9, 0, 9, 0, 2, 9);"
        f"{receiver} (1, 1, 'p', 'r', 1, 'D', 'N', 10, 9),"
        "(1, 7, 'p', 'r', 1, 'N', 'N', 0, 5), (2, 1, 'p', 'r', 1, 'N', 'N', 0, 5)"
    )
    made = source.facts()
    assert made is not None
    queries = {
        "SELECT name FROM public.objectgroup": [(b"new",)],
        # Node 9 is gone: the master answers for it. Node 2's own row is not the master's to bring.
        "SELECT time, cid, mtime FROM public.localstat ORDER BY cid": [(1, 1, 1), (1, 2, 77), (1, 9, 1)],
        "SELECT ipnet, rctime, extime, delay, blocked, passed, cid, mtime FROM public.cgreylist ORDER BY 1": [
            (b"a", 1, 9, 5, 9, 5, 2, 9), (b"x", 1, 1, 1, 1, 1, 1, 1)
        ],
        "SELECT cmailstore_cid, cmailstore_rid, status::text, seen::text, seenmtime, mtime "
        "FROM public.cmsreceivers ORDER BY 1, 2": [
            (1, 1, b"D", b"S", 20, 9), (1, 2, b"N", b"N", 0, 5), (2, 1, b"N", b"N", 0, 5)
        ],
    }  # fmt: skip
    before = {query: target.sql(query) for query in queries}
    options: dict[str, Any] = {"origin": 1, "master": 1, "members": (1, 2)}
    pieces = list(take_chain_snapshot(source.dsn, gateway, own=(1, made.incarnation), **options))
    for finished in (False, True):
        restore = ChainRestore(target.dsn, gateway, own_cid=2, **options)
        for piece, attachment in pieces:
            if piece["kind"] != "result":
                restore.feed(piece, attachment)
            elif finished:
                assert {query: target.sql(query) for query in queries} == before
                restore.finish(piece)
        restore.close()
    assert {query: target.sql(query) for query in queries} == queries
    place = pieces[-1][0]["vector"][1]
    assert target.sql("SELECT origin, incarnation, (lsn - '0/0')::bigint, part FROM pmgsync.position") == [(1, *place)]
    # Nothing of it is in the receiver's own chain.
    messages = target.sql(
        "SELECT data FROM pg_logical_slot_peek_binary_changes('pmgsync', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'pmgsync')"
    )
    kinds = b"".join(bytes(data)[:1] for (data,) in messages).split(b"C")
    assert len([kind for kind in kinds if b"O" in kind and (b"I" in kind or b"D" in kind)]) >= 1
    assert b"O" in kinds[-2]


def test_what_an_origin_does_not_answer_for_is_refused(server: EmbeddedPostgres, gateway: Profile) -> None:
    target = Database(server, "gate", "SQL_ASCII")
    target.sql(GATEWAY.read_bytes())
    target.provision(gateway, cid=2)
    restore = ChainRestore(target.dsn, gateway, origin=3, own_cid=2, master=1, members=(1, 2, 3))
    try:
        for table in (b"rule", b"clusterinfo", b"nothing"):
            with pytest.raises(ProtocolError, match="does not answer for"):
                restore.feed({"kind": "table", "schema": b"public", "table": table, "columns": [b"id"]}, None)
        with pytest.raises(ProtocolError, match="malformed"):
            restore.feed({"kind": "table", "schema": b"pmgsync", "table": b"node", "columns": [b"cid"]}, None)
        # Rows of others among those of the origin are passed over.
        columns = [b"time", b"rblcount", b"pregreetcount", b"cid", b"mtime"]
        restore.feed({"kind": "table", "schema": b"public", "table": b"localstat", "columns": columns}, None)
        restore.feed({"kind": "rows"}, b"1\t0\t0\t3\t1\n1\t0\t0\t1\t1\n")
        restore.feed({"kind": "table-end", "rows": 2}, None)
        restore.finish({"vector": {3: [1, 5, LAST]}, "rows": 2})
    finally:
        restore.close()
    assert target.sql("SELECT time, cid FROM public.localstat") == [(1, 3)]
