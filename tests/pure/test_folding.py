"""Folded phases leave the rows that the changes leave one by one, and fail when those fail."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.folding import Phase
from pmgsync.core.pgoutput import UNCHANGED, Row

Change = tuple[str, Row]
Table = dict[Any, Row]
KEY = itemgetter(0)
keys = st.sampled_from([b"1", b"2", b"3"])
values = st.sampled_from([b"a", b"b", None])
rows = st.tuples(keys, values, values)
partial = st.tuples(keys, values | st.just(UNCHANGED), values | st.just(UNCHANGED))
changes = st.lists(
    st.tuples(st.just("I"), rows) | st.tuples(st.just("U"), partial) | st.tuples(st.just("D"), rows), max_size=12
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
        elif kind == "U":
            table[KEY(row)] = over(row, table[KEY(row)])
        else:
            del table[KEY(row)]
    return table


def phases_of(given_changes: list[Change], *, folds: bool) -> list[Phase]:
    phases = [Phase(KEY, folds=folds)]
    for kind, row in given_changes:
        for _ in range(2):
            take = {"I": phases[-1].insert, "U": phases[-1].update, "D": phases[-1].delete}[kind]
            if take(row):
                break
            phases.append(Phase(KEY, folds=folds))
        else:
            raise AssertionError("an empty phase takes any change")
    return phases


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
        table |= {key: over(row, table[key]) for key, row in phase.updated.items()}
        for row in phase.inserted:
            if row is not None:
                if KEY(row) in table:
                    raise RefusedError
                table[KEY(row)] = row
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
