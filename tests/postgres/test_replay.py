"""Diverged changes made again: what is as it was found is changed, everything else is listed and left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.divergence import Diverged, Values
from pmgsync.errors import PmgsyncError
from pmgsync.postgres.replay import replay
from tests.harness.server import Pair, make_profile

pytestmark = pytest.mark.cluster

SCHEMA = (
    "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, b boolean, g int GENERATED ALWAYS AS "
    "(1) STORED, j json); CREATE TABLE k (a int, b text); CREATE TABLE u (id int PRIMARY KEY, v int UNIQUE)"
)


@pytest.fixture
def pair(server: EmbeddedPostgres) -> Iterator[Pair]:
    options = "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    made = Pair(server, make_profile(), options=options)
    made.run(SCHEMA)
    yield made
    made.close()


def change(kind: str, table: str, key: Values, old: Values | None, new: Values | None) -> Diverged:
    return Diverged(1, 0, kind, b"public", table.encode(), key, old, new)


def outcomes(pair: Pair, *changes: Diverged, force: bool = False) -> list[tuple[str, bool]]:
    dsn = pair.server.dsn(pair.names[0])
    return [(done.outcome, bool(done.reason)) for done in replay(dsn, changes, force=force)]


ROW = {b"id": b"7", b"v": b"it's \xe4", b"b": b"t", b"j": b'{"a":  1}'}


def test_what_is_not_there_is_inserted_once(pair: Pair) -> None:
    insert = change("insert", "t", {b"id": b"7"}, None, ROW)
    assert outcomes(pair, insert) == [("done", False)]
    assert outcomes(pair, insert) == [("there", False)]
    assert outcomes(pair, insert, force=True) == [("there", False)]
    other = change("insert", "t", {b"id": b"7"}, None, {**ROW, b"v": None})
    assert outcomes(pair, other) == [("conflict", True)]
    assert pair.run("SELECT v FROM t") == [(b"it's \xe4",)]
    assert outcomes(pair, other, force=True) == [("forced", True)]
    assert pair.run("SELECT v FROM t") == [(None,)]


def test_a_row_that_is_as_it_was_found_is_changed(pair: Pair) -> None:
    pair.run("INSERT INTO k VALUES (1, NULL), (1, NULL), (2, 'x')")
    old, new = {b"a": b"1", b"b": None}, {b"a": b"1", b"b": b"y"}
    update = change("update", "k", {}, old, new)
    assert outcomes(pair, update, change("delete", "k", {}, old, None)) == [("done", False), ("done", False)]
    assert pair.table("k") == [(b"(1,y)",), (b"(2,x)",)]
    assert outcomes(pair, update) == [("conflict", True)], "no such row is there any more"


def test_what_was_there_before_is_not_known(pair: Pair) -> None:
    pair.run("INSERT INTO u VALUES (1, 10), (2, 20)")
    update = change("update", "u", {b"id": b"1"}, None, {b"id": b"1", b"v": b"11"})
    delete = change("delete", "u", {b"id": b"2"}, {b"id": b"2"}, None)
    assert outcomes(pair, update, delete) == [("conflict", True), ("conflict", True)]
    assert pair.table("u") == [(b"(1,10)",), (b"(2,20)",)]
    dsn = pair.server.dsn(pair.names[0])
    (shown,) = replay(dsn, [update], force=False)
    assert shown.now == {b"id": b"1", b"v": b"10"}
    assert outcomes(pair, update, delete, force=True) == [("forced", True), ("forced", True)]
    assert pair.table("u") == [(b"(1,11)",)]
    assert outcomes(pair, update, delete) == [("there", False), ("there", False)]


def test_rows_that_the_replay_has_written_itself_go_on(pair: Pair) -> None:
    steps = [
        change("insert", "u", {b"id": b"5"}, None, {b"id": b"5", b"v": b"1"}),
        change("update", "u", {b"id": b"5"}, None, {b"id": b"5", b"v": b"2"}),
        change("update", "u", {b"id": b"5"}, {b"id": b"5"}, {b"id": b"6", b"v": b"2"}),
        change("delete", "u", {b"id": b"6"}, {b"id": b"6"}, None),
        change("insert", "u", {b"id": b"7"}, None, {b"id": b"7", b"v": b"2"}),
    ]
    assert outcomes(pair, *steps) == [("done", False)] * 5
    assert pair.table("u") == [(b"(7,2)",)]


def test_what_the_server_refuses_is_a_conflict(pair: Pair) -> None:
    pair.run("INSERT INTO u VALUES (1, 10)")
    taken = change("insert", "u", {b"id": b"2"}, None, {b"id": b"2", b"v": b"10"})
    gone = change("insert", "nowhere", {b"id": b"2"}, None, {b"id": b"2"})
    by_hand = change("schema", "u", {}, None, {b"statement": b"DROP TABLE u"})
    emptied = change("truncate", "u", {}, None, None)
    for force in (False, True):
        assert outcomes(pair, taken, gone, by_hand, force=force) == [("conflict", True)] * 3
    assert outcomes(pair, emptied) == [("conflict", True)]
    assert outcomes(pair, emptied, force=True) == [("forced", True)]
    assert pair.table("u") == []


def test_a_closed_node_refuses_it_as_a_whole(pair: Pair) -> None:
    pair.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'not here' USING ERRCODE = 'read_only_sql_transaction'; END $$; "
        "CREATE TRIGGER refuse BEFORE INSERT ON u FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
    )
    with pytest.raises(PmgsyncError, match="not here"):
        outcomes(pair, change("insert", "u", {b"id": b"5"}, None, {b"id": b"5", b"v": b"1"}))
