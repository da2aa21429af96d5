"""The merge of rows is commutative, associative and idempotent, for every rule and for whole rows."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.merging import Sides, groups, merge_expressions, merge_rows
from pmgsync.core.profile import MergeRule
from pmgsync.errors import ConfigError

RULES = {
    "high": MergeRule("greatest"),
    "low": MergeRule("least"),
    "status": MergeRule("advance", order=("N", "P", "D")),
    "seen": MergeRule("latest", by="seenmtime", tie="S"),
    "seenmtime": MergeRule("latest", by="seenmtime"),
    "data": MergeRule("latest", by="mtime"),
    "more": MergeRule("latest", by="mtime"),
    "mtime": MergeRule("greatest"),
}
small = st.none() | st.integers(-2, 2)
letters = st.none() | st.sampled_from(["N", "P", "D", "S", "?", ""])
rows = st.fixed_dictionaries(
    {
        "key": st.just(1), "high": small, "low": small, "status": letters, "seen": letters, "seenmtime": small,
        "data": letters, "more": letters, "mtime": small,
    }
)  # fmt: skip
Row = dict[str, Any]


def text(value: Any) -> bytes:
    return str(value).encode()


def merge(mine: Row, theirs: Row) -> Row:
    return merge_rows(RULES, mine, theirs, text)


@given(rows, rows)
def test_commutative(one: Row, two: Row) -> None:
    assert merge(one, two) == merge(two, one)


@given(rows, rows, rows)
def test_associative(one: Row, two: Row, three: Row) -> None:
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(rows, rows)
def test_idempotent(one: Row, two: Row) -> None:
    assert merge(one, one) == one
    assert merge(merge(one, two), two) == merge(one, two)


@given(st.lists(rows, min_size=1, max_size=6), st.data())
def test_any_order_any_repeats(met: list[Row], data: st.DataObject) -> None:
    other = data.draw(st.permutations(met + met[:2]))
    assert reduce(merge, met) == reduce(merge, other)


@given(rows)
def test_columns_that_move_together_come_from_one_row(one: Row) -> None:
    two = {**one, "data": "b", "more": "c", "mtime": (one["mtime"] or 0) + 1}
    merged = merge(one, two)
    assert (merged["data"], merged["more"], merged["mtime"]) == ("b", "c", two["mtime"])


def test_changes_to_different_columns_both_survive() -> None:
    row = {
        "key": 1,
        "high": 1,
        "low": 1,
        "status": "N",
        "seen": "N",
        "seenmtime": 5,
        "data": "d",
        "more": "m",
        "mtime": 1,
    }
    delivered, read = {**row, "status": "D"}, {**row, "seen": "S", "seenmtime": 6}
    assert merge(delivered, read) == {**row, "status": "D", "seen": "S", "seenmtime": 6}
    assert merge({**row, "seen": "N"}, {**row, "seen": "S"})["seen"] == "S"


def test_a_column_without_a_rule_is_left_alone() -> None:
    assert merge_rows({}, {"a": 1}, {"a": 2}, text) == {"a": 1}
    assert merge_expressions({}, {"a": Sides(b"m", b"t", b"m", b"t", False)}) == {}


def test_a_missing_compared_column_is_named() -> None:
    with pytest.raises(ConfigError, match="seenmtime"):
        groups(RULES, ["seen"])
