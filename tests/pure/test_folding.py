"""Folded phases leave the rows that the changes leave one by one, and fail when those fail."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.changes import key_reader, read_update
from pmgsync.core.folding import Phase
from pmgsync.core.pgoutput import UNCHANGED, Delete, Row, Update
from pmgsync.errors import ProtocolError
from tests.pure.test_pgoutput import encode

Change = tuple[str, Row]
Table = dict[Any, Row]
KEY = itemgetter(0)
KEY_OF = key_reader((0,))
keys = st.sampled_from([b"1", b"2", b"3"])
values = st.sampled_from([b"a", b"u", None])
rows = st.tuples(keys, values, values)
partial = st.tuples(keys, values | st.just(UNCHANGED), values | st.just(UNCHANGED))
changes = st.lists(
    st.tuples(st.just("I"), rows) | st.tuples(st.sampled_from("UM"), partial) | st.tuples(st.sampled_from("DE"), rows),
    max_size=12,
)
tables = st.lists(rows, max_size=3).map(lambda found: {KEY(row): row for row in found})


class RefusedError(Exception):
    """What a server would not do."""


def over(new: Row, before: Row) -> Row:
    return tuple(was if value is UNCHANGED else value for value, was in zip(new, before, strict=True))


def one_by_one(table: Table, given_changes: list[Change]) -> Table:
    """Return the table after the changes, each of which must meet the row that it names."""
    table = dict(table)
    for kind, row in given_changes:
        if (KEY(row) in table) == (kind == "I"):
            raise RefusedError
        if kind == "I":
            table[KEY(row)] = row
        elif kind in "UM":
            table[KEY(row)] = over(row, table[KEY(row)])
        else:
            del table[KEY(row)]
    return table


def phases_of(given_changes: list[Change], *, folds: bool) -> list[Phase]:
    """Return the phases of changes; M and E are updates and deletes as messages."""
    phases = [Phase(KEY, KEY_OF, folds=folds)]
    for kind, run in groupby(given_changes, key=itemgetter(0)):
        left = [row for _, row in run]
        while left:
            taken = _taken(phases[-1], kind, left)
            if not taken:
                phases.append(Phase(KEY, KEY_OF, folds=folds))
                taken = _taken(phases[-1], kind, left)
                assert taken, "an empty phase takes any change"
            left = left[taken:]
    return phases


def _taken(phase: Phase, kind: str, rows: list[Row]) -> int:
    """Add the first rows, as many as fit."""
    if kind == "M":
        return phase.update_unread([encode(Update(1, None, False, row)) for row in rows])
    if kind == "E":
        return phase.delete_unread([encode(Delete(1, row[:1] + (None,) * 2, True)) for row in rows])
    return int({"I": phase.insert, "U": phase.update, "D": phase.delete}[kind](rows[0]))


def in_phases(table: Table, phases: list[Phase]) -> Table:
    """Return the table after the phases, executed as sets."""
    table = dict(table)
    for phase in phases:
        if phase.absent.keys() & table.keys():
            raise RefusedError
        for wanted in (phase.deleted, phase.updated):
            if not wanted.keys() <= table.keys():
                raise RefusedError
            if wanted is phase.deleted:
                table = {key: row for key, row in table.items() if key not in wanted}
        for key, row in phase.updated.items():
            table[key] = over(read_update(row).new if isinstance(row, bytes) else row, table[key])
        for new in phase.inserted:
            if new is not None:
                if KEY(new) in table:
                    raise RefusedError
                table[KEY(new)] = new
    return table


def outcome(result: Any, *arguments: Any) -> Table | None:
    try:
        found: Table = result(*arguments)
    except RefusedError:
        return None
    return found


@given(tables, changes, st.booleans())
def test_phases_are_the_same_as_one_by_one(table: Table, given_changes: list[Change], folds: bool) -> None:
    phases = phases_of(given_changes, folds=folds)
    assert outcome(in_phases, table, phases) == outcome(one_by_one, table, given_changes)
    assert sum(phase.count for phase in phases) == len(given_changes)


@given(changes)
def test_without_folding_each_row_is_in_a_phase_once(given_changes: list[Change]) -> None:
    for phase in phases_of(given_changes, folds=False):
        touched = [*phase.deleted, *phase.updated, *(KEY(row) for row in phase.inserted if row is not None)]
        assert len(touched) == phase.count or (phase.inserted and not phase.deleted and not phase.updated)
        assert not phase.absent
        assert [KEY(row) for row in phase.deleted_rows()] == list(phase.deleted)


def test_changes_of_one_row_become_one() -> None:
    (phase,) = phases_of([("U", (b"1", b"a", UNCHANGED)), ("U", (b"1", UNCHANGED, b"b"))] * 500, folds=True)
    assert phase.updated == {b"1": (b"1", b"a", b"b")} and phase.count == 1000


def test_what_came_and_went_must_not_have_been_there() -> None:
    row: Row = (b"1", b"a", None)
    (phase,) = phases_of([("D", (b"2", b"a", b"a")), ("I", row), ("D", row)], folds=True)
    assert list(phase.absent) == [b"1"] and phase.inserted == [None]


def test_without_a_key_only_inserts_fit() -> None:
    phase = Phase(None, folds=False)
    assert phase.insert((b"1",)) and phase.insert((b"1",)) and not phase.update((b"1",)) and not phase.delete((b"1",))
    assert phase.inserted == [(b"1",), (b"1",)]


@given(
    st.lists(st.sampled_from([b"", b"a", b"u" * 300, None, UNCHANGED]), min_size=3, max_size=3),
    st.permutations(range(3)),
)
def test_the_key_of_a_message_is_that_of_its_row(row: list[Any], order: list[int]) -> None:
    message = encode(Update(1, None, False, tuple(row)))
    for places in ((0,), (order[0],), tuple(order[:2])):
        assert key_reader(places)(message) == itemgetter(*places)(row)


def test_a_message_that_is_cut_off_has_no_key() -> None:
    message = encode(Update(1, None, False, (b"abc", b"x")))
    for places, whole in (((0,), 16), ((1,), len(message))):
        assert key_reader(places)(message[:whole])
        for size in range(13, whole):
            with pytest.raises(ProtocolError):
                key_reader(places)(message[:size])
