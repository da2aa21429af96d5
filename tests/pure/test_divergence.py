"""Divergence files: what was written is read again byte for byte, and what is unfinished or damaged is not taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.changes import Change, Truncated
from pmgsync.core.divergence import (
    Diverged,
    MastersRows,
    change_line,
    diverged_changes,
    first_line,
    last_line,
    read_lines,
)
from pmgsync.core.forks import Divergence
from pmgsync.core.pgoutput import UNCHANGED, Column, Delete, Insert, Relation, Update
from pmgsync.core.profile import Policy
from pmgsync.errors import ProtocolError
from tests.harness.server import make_profile
from tests.harness.server import rule as rule_of

WHAT = Divergence(1, 77, 0x100, 0x200)
HEAD = first_line(WHAT, cluster=b"c" * 16, node=1, epoch=2)

names = st.binary(min_size=1, max_size=8)
values = st.dictionaries(names, st.none() | st.binary(max_size=20), max_size=4)
changes = st.builds(
    Diverged,
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**52),
    st.sampled_from(["insert", "update", "delete", "truncate", "schema"]),
    names,
    names,
    values,
    st.none() | values,
    st.none() | values,
)


def written(some: list[Diverged]) -> list[str]:
    return [HEAD, *map(change_line, some), last_line(len(some))]


@given(st.lists(changes, max_size=5))
def test_what_was_written_is_read(some: list[Diverged]) -> None:
    lines = written(some)
    assert all(line.isascii() and "\n" not in line for line in lines)
    file = read_lines(lines)
    assert (file.what, file.cluster, file.node, file.epoch) == (WHAT, b"c" * 16, 1, 2)
    assert list(file.changes) == some


@given(st.lists(changes, min_size=1, max_size=4), st.data())
def test_what_is_missing_or_cut_is_noticed(some: list[Diverged], data: st.DataObject) -> None:
    lines = written(some)
    gone = data.draw(st.integers(0, len(lines) - 1))
    with pytest.raises(ProtocolError):
        read_lines(lines[:gone] + lines[gone + 1 :])
    cut = data.draw(st.integers(0, sum(map(len, lines)) + len(lines) - 2))
    with pytest.raises(ProtocolError):
        read_lines("\n".join(lines)[:cut].split("\n"))


@given(st.lists(st.text(max_size=40), max_size=4))
def test_anything_else_is_an_error_of_ours(lines: list[str]) -> None:
    with pytest.raises(ProtocolError):
        read_lines(lines)


def test_what_a_transaction_did() -> None:
    columns = (Column(b"id", True, 23, -1), Column(b"v", False, 25, -1), Column(b"\xff", False, 25, -1))
    rule = Relation(1, b"public", b"rule", "d", columns, b"")
    keyless = Relation(2, b"public", b"log", "f", tuple(column._replace(key=True) for column in columns), b"")
    mail = Relation(3, b"public", b"cstatistic", "f", (Column(b"cid", True, 23, -1), *columns[1:]), b"")
    local = Relation(4, b"public", b"statinfo", "d", columns, b"")
    done: list[Change] = [
        (rule, Insert(1, (b"1", None, b"\x80"))),
        (rule, Update(1, None, False, (b"1", b"new", UNCHANGED))),
        (rule, Update(1, (b"1", None, None), True, (b"2", b"new", UNCHANGED))),
        (rule, Delete(1, (b"2", None, None), True)),
        (keyless, Delete(2, (b"1", None, b"x"), False)),
        (mail, Insert(3, (b"1", b"", b""))),
        (mail, Insert(3, (b"2", b"", b""))),
        (mail, Insert(3, (b"9", b"", b""))),
        (local, Insert(4, (b"1", b"", b""))),
        Truncated((rule, mail), False, False),
    ]
    profile = make_profile(rule_of("cstatistic", Policy.OWNED, owner="cid"), rule_of("statinfo", Policy.LOCAL))
    found = list(diverged_changes(done, 5, 6, MastersRows(profile, 1, (1, 2))))
    place = (b"public", b"rule")
    assert found == [
        Diverged(5, 6, "insert", *place, {b"id": b"1"}, None, {b"id": b"1", b"v": None, b"\xff": b"\x80"}),
        Diverged(5, 6, "update", *place, {b"id": b"1"}, None, {b"id": b"1", b"v": b"new"}),
        Diverged(5, 6, "update", *place, {b"id": b"1"}, {b"id": b"1"}, {b"id": b"2", b"v": b"new"}),
        Diverged(5, 6, "delete", *place, {b"id": b"2"}, {b"id": b"2"}, None),
        Diverged(5, 6, "delete", b"public", b"log", {}, {b"id": b"1", b"v": None, b"\xff": b"x"}, None),
        # Of a node that is gone, in whose place the master writes.
        Diverged(5, 6, "insert", b"public", b"cstatistic", {}, None, {b"cid": b"9", b"v": b"", b"\xff": b""}),
        Diverged(5, 6, "truncate", *place, {}),
    ]
    assert change_line(found[0]) == (
        '{"lsn":"0/5","time":"1970-01-01T00:00:00.000006+00:00","table":["public","rule"],"kind":"insert",'
        '"key":{"id":"1"},"old":null,"new":{"id":"1","v":null,"\\udcff":"\\udc80"}}'
    )
