"""Synchronous mode on the master's side: what capture is told as slaves come, acknowledge, and go. The test's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from broker.chains.chains import Chains
from broker.chains.synchronous import AGAIN_S, WAITS_S, SynchronousCommits
from broker.heartbeats.lag import HeadClock
from broker.members.members import Members
from pmgsync.core.chains import ChainHead
from pmgsync.core.document import ClusterDocument
from pmgsync.core.membership import new_epoch, with_synchronous, without_member
from pmgsync.core.positions import Position
from pmgsync.core.synchronous import EVERYTHING, Said, Setting
from pmgsync.errors import MembershipError
from tests.broker.test_voter import Clock, document

INCARNATION = 7


class Master:
    """Node 1 of a cluster, the master unless the document says otherwise; `heads` and `words` are what it has heard."""

    def __init__(self, members: int = 3) -> None:
        self.clock = Clock()
        self.document = document(range(1, members + 1)).document
        self.leads = True
        self.captures = True
        self.away: set[int] = set()
        self.words: dict[int, Said] = {}
        self.told: list[Mapping[str, Any]] = []
        self.head = 0
        self.heads = HeadClock()
        self.commits = SynchronousCommits(
            1,
            cast(Members, self),
            cast(Chains, _Chain(self)),
            document=lambda: self.document,
            leads=lambda: self.leads,
            change_document=self._change,
            tell=self._tell,
            clock=self.clock,
        )

    def _change(self, changed: ClusterDocument) -> None:
        self.document = changed
        self.commits.tick()

    def _tell(self, message: Mapping[str, Any]) -> bool:
        if self.captures:
            self.told.append(message)
        return self.captures

    # what is asked of `Members`

    def said(self, cid: int, origin: int) -> Said | None:
        return self.words.get(cid) if origin == 1 else None

    def up(self, cid: int) -> bool:
        return cid not in self.away

    # what happens

    def commit(self, lsn: int) -> None:
        self.head = lsn
        self.heads.note(self.clock(), INCARNATION, lsn)

    def hear(self, cid: int, lsn: int, **changes: Any) -> None:
        at = Position(lsn)
        said = Said(self.document.epoch, self.document.master, INCARNATION, at, at)
        self.words[cid] = replace(said, **changes)
        self.commits.acknowledged(cid)

    def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self.clock.now += 0.1
            self.commits.tick()

    @property
    def newest(self) -> tuple[bool, Position]:
        """What capture was told last: whether commits are held, and up to where they may return."""
        message = self.told[-1]
        return message["holds"], Position.parse(message["position"])

    def state(self) -> object:
        return self.commits.status()["state"]

    def begin(self, setting: Setting) -> None:
        """Have the mode in force, everybody in step."""
        self.commit(100)
        for cid in self.document.slaves:
            self.hear(cid, 100)
        self.commits.change(setting)
        self.commits.capture_told(stands=True)
        assert self.state() == "synchronous"


class _Chain:
    """What is asked of `Chains`."""

    def __init__(self, master: Master) -> None:
        self._master = master

    def heads(self) -> dict[int, ChainHead]:
        return {1: ChainHead.at(1, INCARNATION, Position(self._master.head))}

    @property
    def clocks(self) -> dict[int, HeadClock]:
        return {1: self._master.heads}


def test_off_means_that_nothing_is_held() -> None:
    master = Master()
    master.commit(100)
    master.pass_s(3)
    assert master.newest == (False, EVERYTHING)
    assert len(master.told) >= 3, "capture hears each second that the broker is there"
    assert master.state() == "off"
    assert master.commits.alerts() == []


def test_commits_return_with_the_second_of_two() -> None:
    master = Master()
    master.begin(Setting(2, patience_ms=None))
    assert master.newest == (True, Position(100))
    master.commit(110)
    master.hear(2, 110)
    assert master.newest == (True, Position(100))
    master.hear(3, 105)
    assert master.newest == (True, Position(105))
    told = len(master.told)
    master.hear(3, 105)
    assert len(master.told) == told, "capture is told what is new"
    master.hear(3, 110)
    assert master.newest == (True, Position(110))


def test_it_comes_in_force_only_when_slaves_are_in_step() -> None:
    master = Master()
    master.commit(100)
    master.commits.change(Setting(1))
    master.pass_s(3)
    assert (master.state(), master.newest[0]) == ("starting", False)
    assert "do not wait for slaves yet: 0 of 1" in master.commits.alerts()[0]["text"]
    master.hear(2, 50)
    master.pass_s(AGAIN_S)
    assert master.newest[0] is False
    master.hear(2, 100)
    master.away.add(2)
    master.pass_s(AGAIN_S)
    assert master.newest[0] is False, "what it said before it went away does not put the mode in force"
    master.away.clear()
    master.pass_s(AGAIN_S)
    assert master.document.synchronous
    assert master.newest == (True, Position(100))


@pytest.mark.parametrize(
    "changes",
    [{"epoch": 2}, {"master": 2}, {"incarnation": 8}, {"whole": False}],
    ids=["it has voted for another", "it follows another", "another life of the chain", "others leave nothing out"],
)
def test_whose_word_does_not_count(changes: dict[str, Any]) -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=None))
    master.commit(200)
    master.hear(2, 200, **changes)
    assert master.newest == (True, Position(100))
    master.hear(3, 200)
    assert master.newest == (True, Position(200))


def test_who_leaves_out_a_table_counts_when_there_are_no_others() -> None:
    """It could not fetch the table otherwise: that needs every commit that waits to have ended."""
    master = Master()
    master.begin(Setting(1, patience_ms=None))
    master.hear(2, 100, whole=False)
    assert master.commits.alerts() == [], "there is another"
    master.away.add(3)
    master.commit(200)
    master.hear(2, 200, whole=False)
    assert master.newest == (True, Position(200))
    assert "left out on node 2, and commits do not wait for these" in master.commits.alerts()[0]["text"]
    master.away.clear()
    master.hear(3, 200)
    assert master.commits.alerts() == []


def test_visible_is_enough_when_it_is_set_so() -> None:
    for level, lsn in (("durable", 100), ("visible", 150)):
        master = Master()
        master.begin(Setting(1, level, None))
        master.commit(150)
        master.hear(2, 100, visible=Position(150))
        assert master.newest[1] == Position(lsn)


def test_after_its_patience_it_goes_on_without_them_and_comes_back_with_them() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=5000))
    master.away |= {2, 3}
    master.commit(200)
    master.pass_s(4)
    assert master.newest == (True, Position(100))
    assert master.state() == "waiting"
    assert "commits have been waiting for slaves for 4 s" in master.commits.alerts()[0]["text"]
    master.pass_s(2)
    assert master.newest == (False, EVERYTHING)
    assert master.state() == "degraded"
    assert "do not wait for slaves any more: 0 of 1" in master.commits.alerts()[0]["text"]
    assert master.document.synchronous, "the document stays as it is: it comes back by itself"
    master.away.remove(2)
    master.hear(2, 150)
    master.pass_s(1)
    assert master.state() == "degraded"
    master.hear(2, 200)
    master.pass_s(0.1)
    assert master.newest == (True, Position(200))
    assert (master.state(), master.commits.status()["switches"]) == ("synchronous", 2)
    assert master.commits.alerts() == []


def test_slaves_that_are_away_are_missed_before_anybody_commits() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=3000))
    master.away |= {2, 3}
    master.pass_s(4)
    assert master.state() == "degraded"


def test_without_patience_they_wait() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=None))
    master.away |= {2, 3}
    master.commit(200)
    master.pass_s(1000)
    assert master.newest == (True, Position(100))
    assert master.state() == "waiting"
    assert master.commits.status()["waiting_s"] > 1000 - WAITS_S


def test_with_too_few_members_there_is_nothing_to_wait_for() -> None:
    master = Master()
    master.begin(Setting(2, patience_ms=None))
    master.document = without_member(master.document, 3)
    master.pass_s(AGAIN_S)
    assert not master.document.synchronous
    assert master.newest == (False, EVERYTHING)


def test_what_is_set_must_be_possible() -> None:
    master = Master()
    with pytest.raises(MembershipError, match="2 slaves, 3 cannot be waited for"):
        master.commits.change(Setting(3))
    master.begin(Setting(1, patience_ms=None))
    master.away.add(3)
    with pytest.raises(MembershipError, match="1 of 2 slaves are in step, so commits cannot wait for 2"):
        master.commits.change(Setting(2))
    master.away.clear()
    master.commits.change(Setting(2))
    assert master.document.synchronous, "it is in force all the time"
    master.commits.change(Setting())
    assert (master.document.synchronous, master.newest[0], master.state()) == (False, False, "off")


def test_a_new_epoch_begins_anew_and_only_its_master_holds() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=3000))
    master.away |= {2, 3}
    master.pass_s(5)
    assert master.state() == "degraded"

    def become(cid: int, epoch: int) -> None:
        master.document = new_epoch(master.document, cid, epoch=epoch, fork=None, when=0, reason="")
        master.commits.tick()

    become(2, 2)
    assert (master.newest, master.state()) == ((False, EVERYTHING), None)
    become(1, 3)
    assert master.newest[0], "what degraded it is past"
    assert [message["epoch"] for message in master.told[-2:]] == [2, 3]
    master.commit(300)
    master.leads = False
    master.hear(2, 300, epoch=4)
    assert master.newest[1] < Position(300)


def test_a_capture_that_begins_is_told_at_once() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=None))
    master.captures = False
    master.commit(200)
    master.hear(2, 200)
    master.captures = True
    before = len(master.told)
    master.commits.capture_began()
    assert len(master.told) == before + 1
    assert master.newest == (True, Position(200))
    assert master.state() == "starting", "whether its server waits is not known yet"


def test_a_setting_that_is_already_so_changes_nothing() -> None:
    master = Master()
    master.begin(Setting(1, patience_ms=None))
    before = master.document
    master.commits.change(Setting(1, patience_ms=None))
    assert master.document is before
    assert with_synchronous(before, Setting(1, patience_ms=None), in_force=True) is before
