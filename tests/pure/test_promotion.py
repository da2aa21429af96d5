"""Promotion: what is planned, and that every step can be taken again after a crash."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.document import Fork
from pmgsync.core.epochs import Record
from pmgsync.core.lease import Lease, Request, fence_due, is_kept
from pmgsync.core.membership import ClusterDocument, first_document, new_epoch, with_fence, with_member
from pmgsync.core.positions import LAST, Position
from pmgsync.core.promotion import (
    ChainPoint,
    Fetch,
    Progress,
    Step,
    Survivor,
    Way,
    fork_position,
    furthest,
    next_step,
    plan_promotion,
)
from pmgsync.core.votes import Ballot
from pmgsync.errors import ProtocolError
from tests.pure.test_membership import grown, member

LIFE = 7


def at(lsn: int, part: int = LAST, life: int = LIFE) -> ChainPoint:
    return ChainPoint(life, Position(lsn, part))


def test_a_survivor_that_has_more_is_asked_first() -> None:
    others = {
        1: Survivor(1, answers=False, held=at(900)),
        3: Survivor(3, answers=True, held=at(150)),
        4: Survivor(4, answers=True, held=at(180, part=2)),
        5: Survivor(5, answers=True, held=at(10**6, life=8)),
    }
    plan = plan_promotion(grown(5), 2, have=at(100), others=others, published=lambda _: 200)
    assert plan.way is Way.FAILOVER
    assert plan.fetch == Fetch(4, LIFE, Position(179)), "the transaction that is half there does not count"
    assert plan.fork == Fork(LIFE, 179)
    assert plan.known_loss == (179, 200)
    assert plan.unreadable == (5,)
    assert "4 of 5" in plan.reason


def test_without_a_majority_only_by_force() -> None:
    others = {1: Survivor(1, answers=False), 3: Survivor(3, answers=False)}
    plan = plan_promotion(grown(3), 2, have=at(100), others=others)
    assert (plan.way, plan.known_loss, plan.fork) == (Way.REFUSED, None, Fork(LIFE, 100))
    assert "1 of 3 members that have a vote can be reached, 2 are needed" in plan.reason
    assert plan_promotion(grown(3), 2, have=at(100), others=others, force=True).way is Way.FORCED


def test_who_can_be_asked_for_everything_hands_over() -> None:
    others = {1: Survivor(1, answers=True, held=at(900)), 3: Survivor(3, answers=False)}
    assert plan_promotion(grown(3), 2, have=at(1), others=others, force=True).way is Way.SWITCHOVER
    assert plan_promotion(grown(3), 1, have=None, others={}).way is Way.IS_MASTER
    witness = with_member(grown(2), replace(member(3), role="witness"))
    plan = plan_promotion(witness, 3, have=None, others=others, force=True)
    assert plan.way is Way.REFUSED
    assert "witness" in plan.reason


class Gateway:
    """What a promotion changes; `do` takes one step, and may be killed half way."""

    def __init__(self, way: Way, goal: int) -> None:
        self.way, self.end = way, goal
        self.is_master = self.closed = self.sequences = self.open = self.spread = self.won = self.ready = False
        self.applied, self.wait_s = 0, 5.0
        self.opened_early = False

    def progress(self) -> Progress:
        goal = self.end if self.way is not Way.SWITCHOVER or self.closed else None
        return Progress(
            self.is_master, self.way, self.applied, goal, self.wait_s, self.won, self.sequences, self.open,
            self.spread, self.ready,
        )  # fmt: skip

    def do(self, step: Step) -> None:
        match step:
            case Step.READY:
                self.ready = True
            case Step.CLOSE:
                assert self.ready
                self.closed = True
            case Step.DRAIN | Step.FETCH:
                self.applied += 1
            case Step.WAIT:
                self.wait_s = 0.0
            case Step.VOTE:
                assert self.applied >= self.end
                self.won = True
            case Step.BEGIN:
                self.is_master = True
            case Step.SEQUENCES:
                assert self.is_master
                self.sequences = True
            case Step.OPEN:
                assert self.sequences
                self.open = True
            case Step.SPREAD:
                assert self.open
                self.spread = True
            case Step.DONE:
                pass

    def crash(self) -> None:
        """Forget what no disk holds: votes, and who was told; sequences and tables are looked at again."""
        self.won = self.spread = self.ready = False
        self.wait_s = 0.0 if self.is_master else 5.0


@given(st.sampled_from([Way.SWITCHOVER, Way.FAILOVER, Way.FORCED]), st.integers(0, 3), st.sets(st.integers(0, 15)))
def test_killed_at_any_step_it_ends_well(way: Way, goal: int, crashes: set[int]) -> None:
    node = Gateway(way, goal)
    for number in range(60):
        step = next_step(node.progress())
        if step is Step.DONE:
            break
        node.do(step)
        if number in crashes:
            node.crash()
    assert (node.is_master, node.sequences, node.open, node.spread) == (True,) * 4
    assert node.applied >= goal


def test_a_master_that_has_voted_for_another_is_voted_for_again() -> None:
    others = {2: Survivor(2, answers=True), 3: Survivor(3, answers=False)}
    plan = plan_promotion(grown(3), 1, have=at(5), others=others, leads=False)
    assert (plan.way, plan.fetch, plan.known_loss) == (Way.FAILOVER, None, None)
    others[2] = Survivor(2, answers=False)
    assert plan_promotion(grown(3), 1, have=None, others=others, leads=False).way is Way.REFUSED


def test_a_chain_is_followed_only_where_frames_lead() -> None:
    ranges = [(Position(0), Position(10)), (Position(10), Position(20)), (Position(30), Position(40))]
    assert furthest(Position(5), ranges) == Position(20)
    assert furthest(Position(25), ranges) == Position(25)
    assert furthest(Position(30), ranges) == Position(40)


def test_a_copy_beyond_the_newest_frame_is_no_place_to_leave_the_chain() -> None:
    frames = [(Position(5), Position(10))]
    assert fork_position(Position(12), [Position(7)], frames) == Position(10), "the other never gets beyond 10"
    assert fork_position(Position(12), [Position(7), Position(12)], frames) == Position(12)
    assert fork_position(Position(8), [Position(7)], frames) == Position(8), "the other goes on to 10 by itself"
    assert fork_position(Position(12), [], []) == Position(12)


def test_nobody_is_left_where_no_frame_leads_to_the_fork() -> None:
    def fork(*standing: int, since: int = 5) -> int:
        places = [Position(one) for one in standing]
        return fork_position(Position(12), [Position(12)], [], since=Position(since), standing=places).lsn

    assert fork(12) == 12
    assert fork(12, 9) == 9, "the chain has nothing after 5"
    assert fork(12, 2) == 5, "it gets to 5 by frames, or has to be copied anew"
    assert fork(9, 0) == 5, "one was never heard, and may stand anywhere"
    assert fork(9, since=12) == 12, "there are frames up to 12"


lsns = st.integers(0, 20).map(Position)


@given(lsns, lsns, st.lists(lsns, max_size=3), st.lists(st.tuples(lsns, lsns), max_size=5))
def test_whoever_stands_where_nothing_follows_is_at_the_fork_or_beyond(
    have: Position, since: Position, others: list[Position], ranges: list[tuple[Position, Position]]
) -> None:
    fork = fork_position(have, others, ranges, since=since, standing=others)
    assert min(since, fork_position(have, others, ranges)) <= fork <= have
    assert since >= have or all(furthest(one, ranges) >= fork for one in others if one >= since)


@given(lsns, st.lists(lsns, max_size=3), st.lists(st.tuples(lsns, lsns), max_size=5))
def test_somebody_always_gets_to_the_fork(
    have: Position, others: list[Position], ranges: list[tuple[Position, Position]]
) -> None:
    fork = fork_position(have, others, ranges)
    assert fork <= have
    reached = [furthest(one, ranges) for one in others]
    if others:
        assert any(one >= fork for one in reached)
        assert fork == have or all(one <= fork for one in reached), "not before where all of them stop"


def fenced(count: int) -> ClusterDocument:
    return with_fence(grown(count), "lease")


def test_a_fence_takes_three_and_goes_only_when_a_majority_knows() -> None:
    assert fence_due(grown(2), "lease", {}) is None
    three = grown(3)
    assert fence_due(three, "lease", {2: three.version}) == "lease"
    assert fence_due(three, "lease", {2: (1, 1)}) is None
    assert fence_due(three, "none", {2: three.version}) is None
    two = fenced(2)
    assert fence_due(two, "lease", {}) is None
    assert fence_due(two, "lease", {2: two.version}) == "none"
    forced = new_epoch(fenced(3), 2, epoch=2, fork=None, when=0, reason="", forced=True)
    assert forced.fence == "none"
    assert fence_due(forced, "lease", {}) is None
    assert fence_due(forced, "lease", {3: forced.version}) == "lease"


def test_when_a_document_is_kept() -> None:
    assert is_kept(grown(2), {})
    assert not is_kept(grown(3), {})
    assert is_kept(grown(3), {3: grown(3).version})
    assert not is_kept(grown(5), {3: grown(5).version})


def test_how_long_a_master_may_write() -> None:
    document = fenced(5)
    lease = Lease(1, 1)
    assert lease.until(document) == float("-inf")
    lease = lease.acknowledged(2, 100.0).acknowledged(3, 103.0).acknowledged(3, 101.0)
    assert lease.until(document) == 100.0 + 9.0
    lease = lease.acknowledged(4, 105.0)
    assert lease.until(document) == 103.0 + 9.0
    assert lease.missing(document, 110.0) == {2, 5}
    assert lease.until(with_member(grown(4), member(5))) == float("inf"), "not fenced"
    assert lease.released().until(document) == float("-inf")
    again = lease.released().taken_up(106.0).acknowledged(2, 105.9).acknowledged(3, 106.1)
    assert again.sent == {3: 106.1}
    alone = with_fence(first_document(b"c" * 16, "mail", "pmg", member(1)), "lease")
    assert lease.until(alone) == float("inf")


@given(st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_a_record_comes_back(epoch: int, promised: int, voted: bool) -> None:
    record = Record(epoch, Ballot(b"c" * 16, epoch + 1, 3, b"d" * 32) if voted else None, promised)
    assert Record.from_map(record.to_map()) == record


@pytest.mark.parametrize("bad", [{}, {"epoch": -1, "promised": 0}, {"epoch": 1, "promised": 0, "ballot": {"epoch": 1}}])
def test_a_damaged_record_is_an_error(bad: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        Record.from_map(bad)


def test_requests_are_ordered_within_a_run() -> None:
    assert Request(1, 2) > Request(1, 1)
