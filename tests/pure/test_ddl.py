"""Statements of a string, and what a message of a schema change says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.ddl import could_be, only, pick, split, unpack_change, unpack_missing, without_concurrently
from pmgsync.errors import ProtocolError

# Pieces that a statement is made of, each of which may hide a semicolon; none ends a statement.
PIECES = (
    "CREATE", "TABLE", "t", "1", ",", "'a;b'", "'it''s;'", "'back\\'", "E'quo\\'te;'", '"na;me"', '"a""b;"', "$1", "é",
    "$$ a; b $$", "$tag$ $$ ; $$ $tag$", "/* ; */", "/* /* ; */ ; */", "-- ; '\n", "(a; b)", "(';', \")\")", "a$b$c",
    "U&'\\0041;'",
)  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), max_size=6), st.booleans())
def test_a_string_is_split_where_statements_end(statements: list[list[str]], ended: bool) -> None:
    whole = [" ".join(pieces) for pieces in statements]
    text = " ;\n".join(whole) + (" ;" if ended else "")
    empty = [all(piece.startswith(("--", "/*")) for piece in pieces) for pieces in statements]
    found = split(text)
    assert len(found) == empty.count(False)
    for statement, original in zip(found, [w for w, none in zip(whole, empty, strict=True) if not none], strict=True):
        assert statement.text in original
        # What is left away at the ends are comments.
        assert not split(original.replace(statement.text, "", 1))


@given(st.text())
def test_anything_can_be_split(text: str) -> None:
    for statement in split(text):
        assert statement.text in text
        assert statement.text


BODY = "CREATE OR REPLACE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 2 END; END"


def test_a_body_is_part_of_its_function() -> None:
    assert [statement.text for statement in split(f"{BODY}; SELECT 1")] == [BODY, "SELECT 1"]
    assert len(split("BEGIN; CREATE TABLE atomic (a int); END; SELECT 1")) == 4


@pytest.mark.parametrize(
    ("statement", "tag", "fits"),
    [
        ("CREATE UNLOGGED TABLE t (a int)", "CREATE TABLE", True),
        ("create table t as select 1", "CREATE TABLE AS", True),
        ("CREATE TABLE t (a int)", "CREATE TABLE AS", False),
        ("CREATE UNIQUE INDEX i ON t (a)", "CREATE INDEX", True),
        ("CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS ''", "CREATE FUNCTION", True),
        ("CREATE CONSTRAINT TRIGGER x AFTER INSERT ON t EXECUTE FUNCTION f()", "CREATE TRIGGER", True),
        ("CREATE USER MAPPING FOR u SERVER s", "CREATE USER MAPPING", True),
        ("CREATE USER u", "CREATE USER MAPPING", False),
        ("CREATE DATABASE table_t", "CREATE TABLE", False),
        ("SELECT * INTO t FROM u", "SELECT INTO", True),
        ("SELECT 1", "SELECT INTO", False),
        ("GRANT SELECT ON t TO u", "GRANT", True),
        ("GRANT role TO u", "GRANT", False),
        ("GRANT CONNECT ON DATABASE d TO u", "GRANT", False),
        ("COMMENT ON TABLE t IS 'x'", "COMMENT", True),
        ("COMMENT ON ROLE r IS 'x'", "COMMENT", False),
        ("DROP TABLE t", "DROP TABLE", True),
        ("INSERT INTO drop_table VALUES (1)", "DROP TABLE", False),
    ],
)
def test_which_tag_a_statement_may_have(statement: str, tag: str, fits: bool) -> None:
    (found,) = split(statement)
    assert could_be(found, tag) is fits


def test_a_statement_is_picked_by_the_tags_so_far() -> None:
    query = (
        "BEGIN; CREATE TABLE a (x int); INSERT INTO a VALUES (1); CREATE ROLE r; GRANT r TO s; CREATE TABLE b (x int);"
        "GRANT SELECT ON b TO r; CREATE TABLE c AS SELECT 1 AS x; ALTER TABLE a ADD y int; COMMIT"
    )
    tags = ["CREATE TABLE", "CREATE TABLE", "GRANT", "CREATE TABLE AS", "ALTER TABLE"]
    texts = [
        "CREATE TABLE a (x int)",
        "CREATE TABLE b (x int)",
        "GRANT SELECT ON b TO r",
        "CREATE TABLE c AS SELECT 1 AS x",
    ]
    for count, text in enumerate([*texts, "ALTER TABLE a ADD y int"], 1):
        assert pick(query, tags[:count]) == text
    assert pick(query, [*tags, "ALTER TABLE"]) is None
    assert pick(query, []) is None
    assert only("CREATE TABLE a (x int); CREATE INDEX i ON a (x)", "CREATE INDEX") == "CREATE INDEX i ON a (x)"
    assert only("CREATE TABLE a (x int); CREATE TABLE b (x int)", "CREATE TABLE") is None
    assert only(" CREATE TABLE a (x int); ", "whatever") == "CREATE TABLE a (x int)"


@pytest.mark.parametrize(
    ("statement", "plain"),
    [
        ("CREATE INDEX CONCURRENTLY i ON t (a)", "CREATE INDEX  i ON t (a)"),
        ("create unique index concurrently if not exists i ON t (a)", "create unique index  if not exists i ON t (a)"),
        ("DROP INDEX CONCURRENTLY i", "DROP INDEX  i"),
        ("ALTER TABLE t DETACH PARTITION p CONCURRENTLY", "ALTER TABLE t DETACH PARTITION p "),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY v", "REFRESH MATERIALIZED VIEW CONCURRENTLY v"),
        ("CREATE TABLE concurrently (a text DEFAULT 'INDEX CONCURRENTLY')",) * 2,
    ],
)
def test_nothing_is_done_concurrently(statement: str, plain: str) -> None:
    assert without_concurrently(statement) == plain


MESSAGE: dict[str, Any] = {
    "tag": "ALTER TABLE",
    "caller": {
        "role": "someone",
        "path": ["pg_temp_3", "a b", "public"],
        "settings": {"timezone": "UTC", "work_mem": "1"},
    },
    "statement": None,
    "query": "ALTER TABLE t ADD c text DEFAULT '\udcff'",
    "tags": ["ALTER TABLE"],
    "objects": ["table public.t"],
    "dropped": [{"type": "table", "schema": "public", "name": "u", "identity": "public.u"}],
    "tables": [{"schema": "public", "name": "t", "oid": "16385", "shape": "c text", "rewritten": True}],
}  # fmt: skip


def packed(message: object) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode(errors="surrogateescape")


def test_a_message_says_it_all() -> None:
    change = unpack_change(packed(MESSAGE | {"later": 1}))
    assert change.statement == b"ALTER TABLE t ADD c text DEFAULT '\xff'"
    assert (change.role, change.path, change.settings) == (b"someone", (b"a b", b"public"), (("timezone", b"UTC"),))
    assert (change.dropped, change.label) == (((b"public", b"u"),), "ALTER TABLE (table public.t)")
    assert change.tables == ((b"public", b"t", 16385, b"c text", True),)
    assert unpack_change(packed(MESSAGE | {"query": None})).statement == b""
    assert unpack_missing(packed({"tables": [{"schema": "s", "name": "t", "oid": 5}]})) == [(b"s", b"t", 5)]


@given(st.sampled_from(sorted(MESSAGE)), st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.just({}))
def test_a_message_that_is_something_else(key: str, value: object) -> None:
    try:
        unpack_change(packed(MESSAGE | {key: value}))
    except ProtocolError:
        return


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"tables": [{}]}', b'{"tables": [1]}'])
def test_messages_that_cannot_be_read(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_missing(content)
    with pytest.raises(ProtocolError):
        unpack_change(content)
