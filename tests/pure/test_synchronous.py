"""Synchronous mode: a commit returns only when enough slaves have it and the journal has it on disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pmgsync.core.document import Epoch, Fork
from pmgsync.core.forks import NOTHING, last_of_reign
from pmgsync.core.membership import ClusterDocument, Member, first_document, new_epoch, with_member, with_synchronous
from pmgsync.core.positions import ZERO, Position
from pmgsync.core.synchronous import (
    EVERYTHING,
    IN_STEP_S,
    LEVELS,
    MAX_ENDS,
    Ends,
    Patience,
    Said,
    Setting,
    acknowledged,
    confirmable,
    counted,
    in_step,
    is_due,
    reached,
)
from pmgsync.errors import ProtocolError

positions = st.builds(Position, st.integers(1, 50), st.sampled_from([1, 2, 0xFFFFFFFF]))


# -- the setting ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 63), st.sampled_from(LEVELS), st.none() | st.integers(1, 3_600_000))
def test_a_setting_travels(slaves: int, level: str, patience_ms: int | None) -> None:
    setting = Setting(slaves, level, patience_ms)
    assert Setting.from_map(setting.to_map()) == setting


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"slaves": 1, "level": "durable"},
        {"slaves": -1, "level": "durable", "patience_ms": 1},
        {"slaves": 64, "level": "durable", "patience_ms": 1},
        {"slaves": 1, "level": "nearly", "patience_ms": 1},
        {"slaves": 1, "level": "durable", "patience_ms": 0},
        {"slaves": 1, "level": "durable", "patience_ms": 1.5},
        {"slaves": "1", "level": "durable", "patience_ms": 1},
        {"slaves": True, "level": "durable", "patience_ms": 1},
        {"slaves": 1, "level": "durable", "patience_ms": True},
    ],
)
def test_what_is_no_setting_is_refused(data: Any) -> None:
    with pytest.raises(ProtocolError, match="a setting of synchronous mode is"):
        Setting.from_map(data)


def cluster(slaves: int) -> ClusterDocument:
    def member(number: int) -> Member:
        return Member(number, f"n{number}", f"192.0.2.{number}", 1, 2, 3, bytes([number]) * 32, bytes([number]) * 32)

    document = first_document(b"c" * 16, "mail", "pmg", member(1))
    for number in range(2, slaves + 2):
        document = with_member(document, member(number))
    return document


def test_witnesses_and_newcomers_are_no_slaves() -> None:
    document = cluster(3)
    newcomer = replace(document.members[1], state="joining")
    witness = replace(document.members[2], role="witness")
    document = replace(document, members=(document.members[0], newcomer, witness, document.members[3]))
    assert document.slaves == {4}


def test_the_document_carries_the_setting_and_a_forced_epoch_lets_go() -> None:
    setting = Setting(2, "visible", None)
    document = with_synchronous(cluster(2), setting, in_force=True)
    assert document.serial == cluster(2).serial + 1
    assert with_synchronous(document, setting, in_force=True) is document
    assert ClusterDocument.from_json(document.to_json()) == document
    fork = Fork(7, 100)
    voted = new_epoch(document, 2, epoch=2, fork=fork, when=0, reason="")
    forced = new_epoch(document, 2, epoch=2, fork=fork, when=0, reason="", forced=True)
    assert (voted.synchronous, voted.synchronous_wanted) == (True, setting)
    assert (forced.synchronous, forced.synchronous_wanted) == (False, setting)
    assert voted.slaves == {1, 3}


def test_a_document_of_an_older_version_has_no_synchronous_mode() -> None:
    text = cluster(1).to_json().decode()
    for gone in (
        '"synchronous":false,',
        ',"synchronous_wanted":{"level":"durable","patience_ms":10000,"slaves":0}',
    ):
        assert gone in text
        text = text.replace(gone, "")
    assert ClusterDocument.from_json(text.encode()) == cluster(1)


# -- who counts -------------------------------------------------------------------------------------------------------


@given(st.lists(positions, max_size=6), st.integers(1, 4))
def test_reached_is_the_greatest_that_enough_have(found: list[Position], slaves: int) -> None:
    at = reached(found, slaves)
    if len(found) < slaves:
        assert at == ZERO
        return
    assert sum(one >= at for one in found) >= slaves
    assert all(sum(one >= other for one in found) < slaves for other in found if other > at)


def test_only_what_was_said_of_this_life_in_this_epoch_counts() -> None:
    said = Said(3, 1, 77, Position(10), Position(20))
    here = {"epoch": 3, "master": 1, "incarnation": 77}
    assert counted(said, "durable", **here) == Position(10)
    assert counted(said, "visible", **here) == Position(20)
    for other in ({"epoch": 2}, {"epoch": 4}, {"master": 2}, {"incarnation": 78}):
        assert counted(said, "durable", **(here | other)) is None


@given(st.dictionaries(st.integers(2, 8), positions), st.sets(st.integers(2, 8)), st.integers(1, 4))
def test_who_leaves_something_out_counts_only_while_others_are_missing(
    found: dict[int, Position], whole: set[int], slaves: int
) -> None:
    at = acknowledged(found, whole, slaves)
    firm = [position for cid, position in found.items() if cid in whole]
    assert at == reached(firm if len(firm) >= slaves else list(found.values()), slaves)
    if len(firm) >= slaves:
        assert sum(one >= at for one in firm) >= slaves


def test_it_comes_in_force_with_enough_in_step_and_goes_with_the_members() -> None:
    assert is_due(Setting(2), in_force=False, named=2, in_step=1) is None
    assert is_due(Setting(2), in_force=False, named=2, in_step=2) is True
    assert is_due(Setting(2), in_force=True, named=2, in_step=0) is None
    assert is_due(Setting(2), in_force=True, named=1, in_step=1) is False
    assert is_due(Setting(0), in_force=True, named=3, in_step=3) is False
    assert is_due(Setting(0), in_force=False, named=3, in_step=3) is None


def test_who_lacks_nothing_old_is_in_step() -> None:
    assert in_step({2: 0.0, 3: IN_STEP_S, 4: IN_STEP_S / 2}) == {2, 4}


def test_a_master_that_was_replaced_knows_where() -> None:
    fork = Fork(7, 100)
    history = [Epoch(1, 1), Epoch(2, 2, fork), Epoch(3, 1, Fork(8, 50)), Epoch(4, 1), Epoch(5, 3)]
    assert last_of_reign(history[:1], 1) is None
    assert last_of_reign(history[:2], 1) == fork
    assert last_of_reign(history[:4], 1) is None
    assert last_of_reign(history, 1) == NOTHING
    assert last_of_reign(history, 4) is None


# -- patience ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.01, 5), st.booleans(), st.floats(0, 30)), max_size=30))
def test_who_waits_without_end_never_lets_go(looks: list[tuple[float, bool, float]]) -> None:
    now, state = 0.0, Patience()
    for passed_s, there, waiting_s in looks:
        now += passed_s
        state = state.looked(now, in_step=there, waiting_s=waiting_s, patience_s=None)
        assert not state.degraded


@given(st.lists(st.tuples(st.floats(0.01, 5), st.booleans(), st.floats(0, 30)), max_size=30), st.floats(0.1, 10))
def test_it_lets_go_when_its_time_is_over_and_comes_back_with_the_slaves(
    looks: list[tuple[float, bool, float]], patience_s: float
) -> None:
    now, state, missing_since = 0.0, Patience(), None
    for passed_s, there, waiting_s in looks:
        now += passed_s
        before, state = state, state.looked(now, in_step=there, waiting_s=waiting_s, patience_s=patience_s)
        missing_since = None if there else now if missing_since is None else missing_since
        missing_s = 0.0 if missing_since is None else now - missing_since
        if before.degraded:
            assert state.degraded is not there
        else:
            assert state.degraded is (waiting_s > patience_s or missing_s > patience_s)


# -- what capture confirms --------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """A chain as PostgreSQL's WAL has it: commits at (begin of the record, end)."""

    commits: list[tuple[int, int]] = field(default_factory=list)
    lsn: int = 100
    ends: Ends = field(default_factory=lambda: Ends(Position(99), 100))
    safe: int = 100
    confirmed: int = 0
    quorum: Position = ZERO
    returned_free: int = 0

    def confirm(self) -> None:
        lsn = confirmable(self.quorum, self.ends, safe=self.safe, confirmed=self.confirmed)
        assert lsn >= self.confirmed
        assert lsn <= max(self.safe, self.confirmed)
        self.confirmed = lsn
        if self.quorum == EVERYTHING:
            self.returned_free = lsn
        for begin, end in self.commits:
            if end > self.returned_free and end <= lsn:
                assert Position(begin) <= self.quorum, "a commit returned that slaves lack"


steps = st.lists(
    st.tuples(st.sampled_from(["commit", "part", "other", "disk", "ack", "free", "hold"]), st.integers(1, 40)),
    max_size=60,
)


@settings(max_examples=300)
@given(steps)
def test_no_commit_returns_that_slaves_or_the_disk_lack(found: list[tuple[str, int]]) -> None:
    stream = Stream()
    acked = Position(99)
    held = True
    for kind, number in found:
        match kind:
            case "commit":
                begin, end = stream.lsn + number, stream.lsn + number + 8
                stream.lsn = end
                stream.commits.append((begin, end))
                stream.ends.sent(Position(begin), end)
            case "part":
                stream.ends.sent(Position(stream.lsn + number, 1), stream.lsn)
            case "other":
                stream.lsn += number
                stream.ends.passed(stream.lsn)
            case "disk":
                stream.safe = max(stream.safe, min(stream.lsn, stream.safe + number))
            case "ack" if stream.commits:
                acked = max(acked, Position(stream.commits[-1 - number % len(stream.commits)][0]))
            case "free":
                held = False
            case "hold":
                held = True
        stream.quorum = acked if held else EVERYTHING
        stream.confirm()
    if stream.commits:
        stream.quorum, stream.safe = Position(stream.commits[-1][0]), stream.lsn
        stream.confirm()
    else:
        stream.quorum, stream.safe = acked, stream.lsn
        stream.confirm()
    assert stream.confirmed == stream.lsn, "a commit waits for nothing"


def test_ends_are_remembered_coarser_when_they_are_many() -> None:
    ends = Ends(Position(0), 1)
    for number in range(1, 3 * MAX_ENDS):
        ends.sent(Position(number * 10), number * 10 + 5)
    for number in (MAX_ENDS, 2 * MAX_ENDS, 3 * MAX_ENDS - 2):
        assert number * 10 - 60_000 < ends.upto(Position(number * 10)) <= number * 10 + 5
    newest = 3 * MAX_ENDS - 1
    assert ends.upto(Position(newest * 10)) == newest * 10 + 5


# -- the whole --------------------------------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """A master and three slaves, two of which must have what was acknowledged. Acks are late, and come in any order."""

    SLAVES = (2, 3, 4)
    NEEDED = 2

    def __init__(self) -> None:
        super().__init__()
        self.committed = 0
        self.returned = 0
        self.applied = dict.fromkeys(self.SLAVES, 0)
        self.counts = dict.fromkeys(self.SLAVES, 0)
        self.epoch = dict.fromkeys(self.SLAVES, 1)
        self.under_way: list[tuple[int, Said]] = []
        self.words: dict[int, Said] = {}

    @rule()
    def commit(self) -> None:
        self.committed += 1

    @rule(cid=st.sampled_from(SLAVES), most=st.integers(1, 3))
    def apply(self, cid: int, most: int) -> None:
        upto = min(self.committed, self.applied[cid] + most)
        self.applied[cid] = upto
        if self.epoch[cid] == 1:
            self.counts[cid] = upto  # who follows another master passes over what this one wrote

    @rule(cid=st.sampled_from(SLAVES))
    def follow_another(self, cid: int) -> None:
        self.epoch[cid] = 2

    @rule(cid=st.sampled_from(SLAVES))
    def acknowledge(self, cid: int) -> None:
        at = Position(self.applied[cid] * 10)
        self.under_way.append((cid, Said(self.epoch[cid], 1, 7, at, at)))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        cid, said = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.words[cid] = said
        found = [counted(one, "durable", epoch=1, master=1, incarnation=7) for one in self.words.values()]
        at = reached([one for one in found if one is not None], self.NEEDED)
        self.returned = max(self.returned, at.lsn // 10)

    @invariant()
    def enough_have_it(self) -> None:
        have = sorted(self.counts.values(), reverse=True)
        assert self.returned <= have[self.NEEDED - 1]


TestModel = Model.TestCase
