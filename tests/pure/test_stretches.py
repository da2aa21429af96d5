"""Stretches of chains that do not count any more: what is noted, and what is read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.document import Epoch, Fork
from pmgsync.core.positions import MAX_LSN
from pmgsync.core.stretches import Stretch, stretches_between
from pmgsync.errors import ProtocolError

LIFE = 7
ONE = (Epoch(1, 1),)
TWO = (*ONE, Epoch(2, 2, Fork(LIFE, 100), start=Fork(8, 5)))
BACK = (*TWO, Epoch(3, 1, Fork(8, 50), start=Fork(LIFE, 140)))

lsns = st.integers(0, MAX_LSN)
stretches = st.builds(
    Stretch,
    *[st.integers(0, 2**62)] * 4,
    lsns,
    lsns,
    st.none() | lsns,
    st.booleans(),
    st.lists(st.tuples(st.binary(), st.binary()), max_size=3).map(tuple),
    st.booleans(),
    st.booleans(),
)


@given(stretches)
def test_what_is_kept_is_read_again(stretch: Stretch) -> None:
    assert Stretch.from_json(stretch.to_json()) == stretch


@given(st.binary(max_size=60) | stretches.map(lambda one: one.to_json()[:-3]))
def test_anything_else_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Stretch.from_json(data)


def test_a_new_master_leaves_what_the_old_one_wrote_past_the_fork() -> None:
    (found,) = stretches_between(ONE, TWO, node=1, lives={})
    assert (found.node, found.epoch, found.origin, found.incarnation) == (1, 2, 1, LIFE)
    assert (found.after, found.limit, found.upto, found.empty) == (100, MAX_LSN, None, False)
    assert found.ended(130).what.upto == 130 and not found.ended(130).empty
    assert found.ended(90).empty and found.ended(100).empty, "nothing past the fork was there"
    assert stretches_between(TWO, TWO, node=1, lives={}) == ()


def test_a_chain_that_was_begun_anew_has_no_place_in_the_history() -> None:
    found = stretches_between(ONE, TWO, node=3, lives={1: {9}, 2: {8}})
    assert [(one.incarnation, one.after) for one in found] == [(LIFE, 100), (9, 0)]
    assert len({one.id for one in found}) == 2


def test_who_was_away_for_two_epochs_has_what_lies_between_its_times_as_master() -> None:
    (found,) = stretches_between(ONE, BACK, node=1, lives={1: {LIFE}})
    assert (found.after, found.limit) == (100, 140) and found.ended(10**6).what.upto == 140
    assert stretches_between(TWO, BACK, node=1, lives={}) == (Stretch(1, 3, 2, 8, 50),), (
        "and the master in between what it wrote past its fork"
    )


def test_where_histories_part_what_counts_now_was_left_out_by_the_other_side() -> None:
    here = (*ONE, Epoch(2, 2, Fork(LIFE, 100), forced=True, start=Fork(8, 20)))
    there = (*ONE, Epoch(2, 3, Fork(LIFE, 80), forced=True, start=Fork(9, 30)))
    decided = (*there, Epoch(3, 3, forced=True, over=((2, 2),)))
    found = stretches_between(here, decided, node=2, lives={})
    assert [(one.origin, one.after, one.limit, one.gained) for one in found] == [
        (1, 80, 100, False),
        (2, 20, MAX_LSN, False),
        (3, 30, MAX_LSN, True),
    ]
    assert len({one.id for one in found}) == 3 and {one.epoch for one in found} == {3}
    assert not any(one.gained for one in stretches_between(here, decided, node=3, lives={}))
