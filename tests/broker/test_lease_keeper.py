"""The master's side of the lease, with the real voters of the other members and a clock that the test moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.cluster.state_directory import StateDirectory
from broker.leadership.asking import Answer
from broker.leadership.lease import FENCE_S, LeaseKeeper, Surroundings
from broker.leadership.voter import Voter
from broker.members.calls import End
from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Refused
from pmgsync.core.lease import Request
from pmgsync.core.membership import SignedDocument, sign, with_fence, without_member
from pmgsync.core.votes import Vote
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message
from tests.broker.test_voter import KEYS, LEASE_S, Clock, document

MARGIN_S = LEASE_S / 10


class Cluster:
    """Members 1 (master) to n; who is in `away` hears nothing. The agent writes what it is told, unless it is frozen.

    Attributes:
        deadline, fenced: what stands in the master's database.
    """

    def __init__(self, directory: Path, members: int, *, fence: str) -> None:
        self.clock = Clock()
        self.away: set[int] = set()
        self.frozen = False
        self.guard_stands = True
        self.shuts_well = True
        self.asked = 0
        self.deadline, self.fenced = 0.0, False
        self.unread: list[Message] = []
        self.signed = document(range(1, members + 1))
        if self.signed.document.fence != fence:
            self.signed = self.sign(with_fence(self.signed.document, fence))
        self.voters = {
            cid: Voter(StateDirectory(directory / str(cid)), KEYS[cid], clock=self.clock)
            for cid in range(1, members + 1)
        }
        for cid, voter in self.voters.items():
            voter.follow(self.signed, cid)
        self.keeper = LeaseKeeper(
            1,
            self.voters[1],
            Surroundings(
                document=lambda: self.signed,
                change_document=self.change,
                offer_document=lambda cid, data: None,
                ask=self.ask,
                send=self.send,
                refused=lambda cid, error: None,
                tell_agent=self.tell_agent,
                ask_agent=self.ask_agent,
            ),
            clock=self.clock,
        )

    def sign(self, changed: ClusterDocument) -> SignedDocument:
        return sign(changed, 1, KEYS[1].sign_private, after=self.signed)

    def change(self, changed: ClusterDocument) -> None:
        self.voters[1].refuse_change(changed)
        self.signed = self.sign(changed)
        self.voters[1].follow(self.signed, 1)
        self.keeper.follow_document()

    # -- members ------------------------------------------------------------------------------------------------------

    def ask(self, cid: int, message: Mapping[str, Any], answer: Answer) -> bool:
        self.asked += 1
        if cid in self.away:
            return False
        given = self.voters[cid].acknowledge(1, message["epoch"], Request(message["run"], message["number"]))
        if isinstance(given, Refused):
            answer({"op": "error", "epoch": given.epoch}, ())
        else:
            held = self.voters[cid].held
            assert held is not None
            epoch, serial = held.document.version
            answer({"op": "done", "result": {"epoch": epoch, "serial": serial}}, ())
        return True

    def send(self, cid: int, message: Mapping[str, Any], attachments: Sequence[bytes]) -> bool:
        if cid not in self.away and message["op"] == "offer":
            offered = SignedDocument.unpack(attachments[0])
            if self.voters[cid].may_take(offered):
                self.voters[cid].follow(offered, cid)
        elif cid not in self.away and message["op"] == "lease.release":
            self.voters[cid].release(1, Request(message["run"], message["number"]))
        return True

    def vote(self, voter: int, candidate: int, epoch: int = 2) -> Vote | Refused:
        return self.voters[voter].vote(self.signed.ballot(epoch, candidate))

    # -- the agent ----------------------------------------------------------------------------------------------------

    def tell_agent(self, message: Message) -> bool:
        self.unread.append(message)
        if not self.frozen:
            self.thaw()
        return True

    def thaw(self) -> None:
        """Have the agent read what it was told."""
        self.frozen, unread, self.unread = False, self.unread, []
        for message in unread:
            self.deadline, self.fenced = message["until"], message["fenced"] and self.guard_stands
        if unread:
            self.keeper.agent_told(unread[-1]["number"], guarded=self.guard_stands)

    def ask_agent(self, caller: End, method: str) -> None:
        assert method == "lease.shut"
        if self.frozen:
            raise UnreachableError("no agent")
        if self.shuts_well:
            self.deadline = 0.0
        caller.send({"op": "done", "result": {"closed": self.shuts_well}}, ())

    # -- time ---------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.clock.now += 0.1
            self.keeper.tick()

    def is_open(self) -> bool:
        return not self.fenced or self.deadline > self.clock.now


@pytest.fixture
def three(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, 3, fence="lease")


def released(cluster: Cluster) -> list[PmgsyncError | None]:
    answers: list[PmgsyncError | None] = []
    cluster.keeper.release(answers.append)
    return answers


def test_the_lease_is_kept_by_a_majority_and_passes_without_one(three: Cluster) -> None:
    three.run(30)
    assert three.is_open()
    three.away = {3}
    three.run(30)
    assert three.is_open()
    status = three.keeper.status()
    assert status["missing"] == [3]
    assert status["acknowledged"] == [1, 2]
    assert LEASE_S - MARGIN_S - 1.1 < status["left_s"] < LEASE_S - MARGIN_S
    three.away = {2, 3}
    three.run(LEASE_S - MARGIN_S - 1.5)
    assert three.is_open()
    three.run(1.5)
    assert not three.is_open()
    assert isinstance(three.vote(2, 3), Refused), "it is closed before a promise is over"
    three.away = {2}
    three.run(1.2)
    assert three.is_open()


def test_who_was_promised_to_may_be_voted_against_after_a_lease(three: Cluster) -> None:
    three.run(3)
    three.away = {2, 3}
    three.run(LEASE_S)
    assert not three.is_open()
    assert isinstance(three.vote(2, 3), Vote)
    three.away = set()
    three.run(2)
    assert three.is_open(), "the other one still supports it"
    assert three.keeper.heard_epoch == 2
    three.clock.now += LEASE_S
    assert isinstance(three.vote(3, 3), Vote)
    three.run(2 * LEASE_S)
    assert not three.is_open()


def test_a_frozen_agent_is_thought_of_as_open_as_long_as_it_was_told(three: Cluster) -> None:
    """The members' majority changes, and with it what the lease is; what the database was told stays."""
    three.run(3)
    told = three.deadline
    three.frozen = True
    three.away = {2, 3}
    three.run(4)
    assert three.deadline == told
    assert three.voters[1].bound_s(3) >= told - three.clock.now
    three.thaw()
    assert three.deadline >= told


def test_a_master_that_votes_for_another_opens_nothing_any_more(three: Cluster) -> None:
    three.run(3)
    three.away = {2, 3}
    three.run(LEASE_S)
    assert isinstance(three.vote(1, 3), Vote)
    three.away, three.asked = set(), 0
    three.run(5)
    assert not three.is_open()
    assert three.asked == 0


def test_a_handover_closes_first_and_frees_the_others_at_once(three: Cluster) -> None:
    three.run(3)
    assert released(three) == [None]
    assert not three.is_open()
    assert isinstance(three.vote(2, 3), Vote)
    assert isinstance(three.vote(3, 3), Vote)
    three.asked = 0
    three.run(5)
    assert three.asked == 0, "an acknowledgement now would be a promise again"
    assert not three.is_open()


def test_a_handover_that_nobody_takes_ends_by_itself(three: Cluster) -> None:
    three.run(3)
    assert released(three) == [None]
    three.run(LEASE_S - 1)
    assert not three.is_open()
    three.run(2.5)
    assert three.is_open()


def test_a_handover_can_be_taken_back(three: Cluster) -> None:
    three.run(3)
    assert released(three) == [None]
    three.keeper.take_up()
    assert three.is_open()
    assert isinstance(three.vote(2, 3), Refused)


@pytest.mark.parametrize("trouble", ["frozen", "commit"])
def test_a_handover_that_fails_leaves_a_master(three: Cluster, trouble: str) -> None:
    three.run(3)
    three.shuts_well = trouble != "commit"
    three.frozen = trouble == "frozen"
    (error,) = released(three)
    assert isinstance(error, UnreachableError)
    assert isinstance(three.vote(2, 3), Refused), "nothing was let go"
    three.thaw()
    three.run(2)
    assert three.is_open()


def test_what_is_not_fenced_is_fenced_before_it_is_handed_over(tmp_path: Path) -> None:
    two = Cluster(tmp_path, 2, fence="none")
    two.run(3)
    assert two.deadline == math.inf
    assert not two.fenced
    two.guard_stands = False
    answers = released(two)
    two.run(5)
    assert not answers
    assert two.is_open()
    two.guard_stands = True
    two.run(1.5)
    assert answers == [None]
    assert not two.is_open()
    assert isinstance(two.vote(2, 2), Vote)
    assert isinstance(two.vote(1, 2), Vote)
    two.run(3 * LEASE_S)
    assert not two.is_open(), "who has voted for another does not go on"


def test_a_handover_waits_only_so_long_for_tables_that_are_in_use(tmp_path: Path) -> None:
    two = Cluster(tmp_path, 2, fence="none")
    two.run(3)
    two.guard_stands = False
    answers = released(two)
    two.run(FENCE_S + 1)
    assert isinstance(answers[0], UnreachableError)
    assert two.is_open()
    assert two.keeper.status()["open"]


def test_the_fence_comes_with_the_third_voter_when_the_triggers_stand(tmp_path: Path) -> None:
    three = Cluster(tmp_path, 3, fence="none")
    three.guard_stands = False
    three.run(5)
    assert three.signed.document.fence == "none"
    three.guard_stands = True
    three.run(2)
    assert three.signed.document.fence == "lease"
    assert three.is_open()
    three.away = {2, 3}
    three.run(LEASE_S)
    assert not three.is_open()


def test_the_fence_goes_with_the_third_voter(three: Cluster) -> None:
    three.run(3)
    three.change(without_member(three.signed.document, 3))
    assert three.signed.document.fence == "none", "the other one holds it, so there is nothing to wait for"
    three.away = {2}
    three.run(2 * LEASE_S)
    assert three.is_open()


def test_a_master_that_is_cut_off_cannot_remove_the_others(tmp_path: Path) -> None:
    four = Cluster(tmp_path, 4, fence="lease")
    four.run(3)
    four.away = {2, 3, 4}
    four.change(without_member(four.signed.document, 4))
    with pytest.raises(MembershipError, match="majority"):
        four.change(without_member(four.signed.document, 3))
    four.run(2 * LEASE_S)
    assert four.signed.document.fence == "lease"
    assert not four.is_open()


def test_a_wish_for_no_fence_is_followed(tmp_path: Path) -> None:
    three = Cluster(tmp_path, 3, fence="none")
    three.change(replace(three.signed.document, serial=9, fence_wanted="none"))
    three.run(20)
    assert three.signed.document.fence == "none"


def test_somebody_waits_until_a_majority_holds_the_document(three: Cluster) -> None:
    answers: list[PmgsyncError | None] = []
    three.run(2)
    three.away = {2, 3}
    three.change(replace(three.signed.document, serial=three.signed.document.serial + 1))
    three.keeper.when_kept(answers.append)
    three.run(3)
    assert not answers
    three.away = {2}
    three.send(3, {"op": "offer"}, (three.signed.pack(),))
    three.run(1.5)
    assert answers == [None]
    three.away = {2, 3}
    three.change(replace(three.signed.document, serial=three.signed.document.serial + 1))
    three.keeper.when_kept(answers.append)
    three.run(12)
    assert isinstance(answers[1], UnreachableError)
