"""Levels: every change is in exactly one set, no set has a key twice, and the changes of a key keep their order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.levels import Levels

changes = st.lists(st.tuples(st.integers(0, 5), st.sampled_from("IU")))


@given(changes)
def test_the_changes_of_a_key_keep_their_order(done: list[tuple[int, str]]) -> None:
    levels: Levels[str, tuple[int, str, int]] = Levels()
    numbered = [(key, kind, number) for number, (key, kind) in enumerate(done)]
    for row in numbered:
        levels.add(row[0], row[1], row)
    executed: list[tuple[int, str, int]] = []
    for kind, rows in levels:
        assert {row[1] for row in rows} == {kind}
        assert len({row[0] for row in rows}) == len(rows)
        executed += rows
    for key in range(6):
        assert [row for row in executed if row[0] == key] == [row for row in numbered if row[0] == key]
    assert sorted(executed, key=lambda row: row[2]) == numbered


@given(changes)
def test_there_are_no_more_levels_than_changes_of_one_key(done: list[tuple[int, str]]) -> None:
    levels: Levels[str, int] = Levels()
    for key, _ in done:
        levels.add(key, "I", key)
    assert len(list(levels)) == max((sum(key == other for other, _ in done) for key, _ in done), default=0)
