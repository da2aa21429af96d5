"""Which changes count: all who hold a history judge alike, and what is left over is named exactly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.document import Epoch, Fork
from pmgsync.core.forks import Divergence, Standing, diverged, judge
from pmgsync.core.judges import Judge
from pmgsync.core.positions import Position

LIFE = 7
"""Every chain's incarnation here."""

ONE = (Epoch(1, 1),)
TWO = (*ONE, Epoch(2, 2, Fork(LIFE, 100), start=Fork(LIFE, 5)))
BACK = (*TWO, Epoch(3, 1, Fork(LIFE, 50), start=Fork(LIFE, 140)))
AGAIN = (*ONE, Epoch(2, 1), Epoch(4, 2, Fork(LIFE, 100)))


def standing(history: tuple[Epoch, ...], origin: int, epoch: int, lsn: int, life: int = LIFE) -> Standing:
    return judge(history, origin=origin, epoch=epoch, incarnation=life, lsn=lsn).standing


def test_the_master_of_an_epoch_counts_up_to_the_fork() -> None:
    assert standing(ONE, 1, 1, 10**9) is Standing.COUNTS
    assert standing(ONE, 2, 1, 5) is Standing.NOT_MASTER
    assert standing(ONE, 2, 2, 5) is Standing.UNKNOWN
    assert standing(TWO, 1, 1, 100) is Standing.COUNTS
    assert standing(TWO, 1, 1, 101) is Standing.PAST_FORK
    assert standing(TWO, 1, 1, 100, life=8) is Standing.PAST_FORK, "another life of the chain"
    assert standing(TWO, 1, 2, 100) is Standing.COUNTS, "read again and marked with the epoch of now"
    assert standing(TWO, 1, 2, 101) is Standing.PAST_FORK
    assert standing(TWO, 2, 1, 5) is Standing.NOT_MASTER
    assert standing(TWO, 2, 2, 6) is Standing.COUNTS
    assert standing(TWO, 2, 1, 6) is Standing.COUNTS, "marked before capture knew the epoch"
    assert standing(TWO, 2, 2, 5) is Standing.NOT_MASTER, "written before its time, and marked with the epoch of now"
    assert standing(TWO, 2, 1, 6, life=8) is Standing.NOT_MASTER, "of another life only the mark tells"
    assert standing(TWO, 2, 2, 6, life=8) is Standing.COUNTS


def test_a_master_that_comes_back_counts_again() -> None:
    assert standing(BACK, 1, 1, 100) is Standing.COUNTS
    assert standing(BACK, 1, 1, 120) is Standing.PAST_FORK
    assert standing(BACK, 1, 2, 120) is Standing.PAST_FORK
    assert standing(BACK, 1, 3, 120) is Standing.PAST_FORK, "marked with the epoch of now"
    assert standing(BACK, 1, 3, 150) is Standing.COUNTS
    assert standing(BACK, 1, 2, 150) is Standing.COUNTS
    assert standing(BACK, 2, 2, 50) is Standing.COUNTS
    assert standing(BACK, 2, 3, 51) is Standing.PAST_FORK


def test_one_elected_again_goes_on() -> None:
    assert standing(AGAIN, 1, 1, 90) is Standing.COUNTS
    assert standing(AGAIN, 1, 2, 100) is Standing.COUNTS
    assert standing(AGAIN, 1, 3, 101) is Standing.PAST_FORK, "an epoch that was voted for in vain"
    assert standing(AGAIN, 2, 4, 1) is Standing.COUNTS


def test_what_comes_from_the_other_side_of_a_split_does_not_wait() -> None:
    def from_there(epoch: int, elsewhere: int) -> Standing:
        return judge(TWO, origin=3, epoch=epoch, incarnation=LIFE, lsn=7, elsewhere=elsewhere).standing

    assert from_there(3, 3) is Standing.ELSEWHERE and Standing.ELSEWHERE.diverges
    assert from_there(4, 3) is Standing.UNKNOWN, "an epoch that neither side knew of"
    assert from_there(2, 3) is Standing.NOT_MASTER


def test_what_a_returning_master_and_a_slave_ahead_have_too_much() -> None:
    for have in (Position(130), Position(131, 2)):
        assert diverged(ONE, TWO, origin=1, incarnation=LIFE, have=have) == (Divergence(1, LIFE, 100, 130),)
    assert diverged(ONE, TWO, origin=1, incarnation=LIFE, have=Position(100)) == ()
    assert diverged(ONE, TWO, origin=2, incarnation=LIFE, have=Position(10**6)) == ()
    assert diverged(TWO, BACK, origin=2, incarnation=LIFE, have=Position(60)) == (Divergence(2, LIFE, 50, 60),)
    assert diverged(TWO, BACK, origin=1, incarnation=LIFE, have=Position(140)) == ()


def test_the_side_of_a_split_that_gives_way_has_its_whole_epoch_too_much() -> None:
    one = (*ONE, Epoch(2, 2, Fork(LIFE, 100), forced=True, start=Fork(LIFE, 20)))
    other = (*ONE, Epoch(2, 3, Fork(LIFE, 80), forced=True, start=Fork(LIFE, 30)))
    decided = (*other, Epoch(3, 3, forced=True, over=((2, 2),)))
    assert diverged(one, decided, origin=2, incarnation=LIFE, have=Position(70)) == (Divergence(2, LIFE, 20, 70),)
    assert diverged(one, decided, origin=1, incarnation=LIFE, have=Position(100)) == (Divergence(1, LIFE, 80, 100),)
    assert diverged(one, decided, origin=3, incarnation=LIFE, have=Position(70)) == ()


def made(entries: list[tuple[int, int, int]]) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(number + 1, master, Fork(LIFE, fork) if number else None, start=Fork(LIFE, start) if number else None)
        for number, (master, fork, start) in enumerate(entries)
    )


histories = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5)


@given(histories, st.integers(0, 4), st.integers(1, 3), st.integers(1, 80))
def test_what_diverges_counted_before_and_does_not_now(
    entries: list[tuple[int, int, int]], cut: int, origin: int, have: int
) -> None:
    new = made(entries)
    old = new[: 1 + cut % len(new)]

    def counted(history: tuple[Epoch, ...], lsn: int) -> bool:
        return any(
            (entry.start.lsn if entry.start else 0) < lsn
            and standing(history, origin, entry.epoch, lsn) is Standing.COUNTS
            for number, entry in enumerate(history)
            if entry.master == origin and (number == 0 or history[number - 1].master != origin)
        )

    pieces = diverged(old, new, origin=origin, incarnation=LIFE, have=Position(have))
    named = {lsn for piece in pieces for lsn in range(piece.after + 1, piece.upto + 1)}
    assert named == {lsn for lsn in range(1, have + 1) if counted(old, lsn) and not counted(new, lsn)}


@given(histories, st.integers(1, 3), st.integers(1, 80))
def test_it_does_not_matter_which_run_of_capture_has_marked_a_transaction(
    entries: list[tuple[int, int, int]], origin: int, lsn: int
) -> None:
    history = made(entries)
    first_master = history[0].master
    found = {standing(history, origin, entry.epoch, lsn) for entry in history}
    assert len(found) == 1 and (Standing.UNKNOWN not in found)
    if origin == first_master and len({entry.master for entry in history}) == 1:
        assert found == {Standing.COUNTS}


@given(histories, st.integers(1, 3), st.tuples(st.integers(0, 70), st.integers(0, 70)).map(sorted), st.integers(0, 9))
def test_transactions_that_are_judged_alike_are(
    entries: list[tuple[int, int, int]], origin: int, between: list[int], elsewhere: int
) -> None:
    history = made(entries)
    first, last = between
    if not Judge(origin, history, (1, 2, 3), elsewhere, lambda *_: "").alike(first, last):
        return
    for epoch in range(1, 8):
        found = {
            judge(history, origin=origin, epoch=epoch, incarnation=LIFE, lsn=lsn, elsewhere=elsewhere)
            for lsn in range(first, last + 1)
        }
        assert len(found) == 1
    assert Judge(origin, history[:1], (1, 2, 3), elsewhere, lambda *_: "").alike(first, last)
