"""Retention: nothing is forgotten that somebody needs unless a limit says so, and then somebody is told."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from broker.journal.retention import (
    MARK_BYTES,
    MARK_SPAN_S,
    MAX_STEP_S,
    Decision,
    Held,
    Ledger,
    Limits,
    Mark,
    WallAge,
    decide,
)
from pmgsync.core.positions import LAST, ZERO, Position

UNLIMITED = Limits(1 << 62, 1e12)
positions = st.builds(Position, st.integers(0, 120), st.sampled_from([1, 2, LAST]))


@st.composite
def helds(draw: st.DrawFn) -> Held:
    ends = sorted(draw(st.sets(st.integers(11, 100), max_size=6)))
    ages = sorted(draw(st.lists(st.floats(0, 100), min_size=len(ends), max_size=len(ends))), reverse=True)
    marks = [Mark(Position(end), draw(st.integers(1, 50)), age) for end, age in zip(ends, ages, strict=True)]
    return Held(Position(10), Position(ends[-1] if ends else 10), marks)


members = st.sets(st.integers(1, 4))
knowns = st.dictionaries(
    st.integers(1, 4), st.dictionaries(st.integers(1, 4), st.none() | positions, max_size=4), max_size=4
)
limitses = st.builds(Limits, st.integers(0, 200), st.floats(0, 120))


@given(helds(), members, knowns, limitses)
def test_a_decision_is_sound(
    held: Held, cluster: set[int], known: dict[int, dict[int, Position | None]], limits: Limits
) -> None:
    decision = decide({1: held}, cluster, known, limits)[1]
    assert held.first <= decision.trim <= held.head
    assert decision.trim.complete
    reached = {member: known.get(member, {}).get(1) for member in cluster - {1}}
    behind = {
        member
        for member, position in reached.items()
        if position is not None
        and (position if position.complete else Position(max(position.lsn - 1, 0))) < decision.trim
    }
    assert decision.resync == behind, "exactly those who are behind what is forgotten"
    unknown = any(position is None for position in reached.values())
    kept = [mark for mark in held.marks if mark.position > decision.trim]
    if (behind or unknown) and decision.trim > held.first:
        # Somebody may have needed the newest stretch that was forgotten: then it was over a limit.
        newest = [mark for mark in held.marks if mark.position <= decision.trim][-1]
        over = sum(mark.size for mark in kept) + newest.size > limits.max_bytes or newest.age_s > limits.max_age_s
        assert over
    assert sum(mark.size for mark in kept) <= limits.max_bytes
    assert all(mark.age_s <= limits.max_age_s for mark in kept)


@given(helds(), members, knowns)
def test_without_limits_everything_needed_is_kept(
    held: Held, cluster: set[int], known: dict[int, dict[int, Position | None]]
) -> None:
    assume(cluster - {1})
    reached = [known.get(member, {}).get(1) for member in cluster - {1}]
    decision = decide({1: held}, cluster, known, UNLIMITED)[1]
    if None in reached:
        assert decision.trim == held.first
    for position in reached:
        if position is not None and position >= held.first and position.complete:
            assert decision.trim <= position


@given(helds(), members, knowns, limitses)
def test_a_second_decision_changes_nothing(
    held: Held, cluster: set[int], known: dict[int, dict[int, Position | None]], limits: Limits
) -> None:
    once = decide({1: held}, cluster, known, limits)[1]
    rest = Held(once.trim, held.head, [mark for mark in held.marks if mark.position > once.trim])
    assert decide({1: rest}, cluster, known, limits)[1] == once


def test_who_left_and_the_origin_hold_nothing_back() -> None:
    held = Held(Position(10), Position(90), [Mark(Position(90), 5, 1.0)])
    known: dict[int, dict[int, Position | None]] = {2: {1: Position(90)}, 3: {1: Position(20)}}
    assert decide({1: held}, {1, 2}, known, UNLIMITED) == {1: Decision(Position(90), frozenset())}
    assert decide({1: held}, {1, 2, 3}, known, UNLIMITED) == {1: Decision(Position(20), frozenset())}
    assert decide({1: held}, {1, 2, 3}, known, Limits(1, 1e9)) == {1: Decision(Position(90), frozenset({3}))}
    assert decide({1: held}, {1, 2, 4}, known, Limits(1, 1e9)) == {1: Decision(Position(90), frozenset())}


def test_a_half_transaction_is_needed_from_its_first_part() -> None:
    held = Held(Position(10), Position(40), [Mark(Position(30), 5, 1.0), Mark(Position(40), 5, 1.0)])
    decision = decide({1: held}, {2}, {2: {1: Position(40, 7)}}, UNLIMITED)[1]
    assert decision.trim == Position(39)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, MARK_BYTES), st.floats(0, MARK_SPAN_S)), max_size=60), st.data()
)
def test_the_ledger_counts_every_byte(frames: list[tuple[bool, int, float]], data: st.DataObject) -> None:
    ledger, now, part, total, half = Ledger(), 0.0, 0, 0, 0
    lsn = 1
    ends: list[tuple[Position, int]] = []
    for last, size, pause in frames:
        now += pause
        part = 0 if last else part + 1
        ledger.add(Position(lsn) if last else Position(lsn, part), size, now)
        if last:
            ends.append((Position(lsn), size + half))
            total, half, lsn = total + size + half, 0, lsn + 1
        else:
            half += size
        assert ledger.size == total + half
    marks = ledger.marks(now)
    assert sum(mark.size for mark in marks) == total
    assert [mark.position for mark in marks] == sorted({mark.position for mark in marks})
    assert [mark.age_s for mark in marks] == sorted((mark.age_s for mark in marks), reverse=True)
    assert (ledger.oldest_age_s(now) is None) == (not frames)
    ledger.drop_parts()
    assert ledger.size == total
    upto = Position(data.draw(st.integers(0, lsn)))
    ledger.trim(upto)
    kept = sum(size for end, size in ends if end > upto)
    largest = max((mark.size for mark in marks), default=0)
    assert kept <= ledger.size <= kept + largest
    ledger.trim(Position(lsn))
    assert ledger.size == 0
    assert ledger.oldest_age_s(now) is None


@given(st.lists(st.floats(0, 4e9), min_size=1, max_size=20))
def test_no_jump_of_the_wall_clock_ages_a_chain(stamps: list[float]) -> None:
    age = WallAge()
    steady = [age.step(stamp) for stamp in stamps]
    assert steady[0] == 0.0
    rounding = 1e-3
    assert all(0.0 <= later - earlier <= MAX_STEP_S + rounding for earlier, later in pairwise(steady))


def test_nothing_held_is_nothing_to_decide() -> None:
    assert decide({2: Held(ZERO, ZERO, ())}, {1}, {}, UNLIMITED) == {2: Decision(ZERO, frozenset())}
