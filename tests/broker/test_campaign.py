"""A campaign for votes, with the real voters, what they really answer, and a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from broker.cluster.state_directory import StateDirectory
from broker.leadership.asking import Answer
from broker.leadership.campaign import RIVAL_S, Campaign
from broker.leadership.handover import Handover
from broker.leadership.voter import Voter
from broker.members.calls import Attachments
from broker.requests.voting import VotingRequests
from pmgsync.core.lease import Request
from pmgsync.core.membership import SignedDocument, sign, with_fence
from pmgsync.wire.messages import Message
from tests.broker.test_voter import KEYS, LEASE_S, Clock, document

STEP_S = 0.02
DELAYS_S = (0.001, 0.01, 0.1)


class Members:
    """Members 1 (the master, who is dead) to 4. Messages are under way for a time, and come in any order."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.away = {1}
        self.signed = document(range(1, 5))
        self.under_way: list[tuple[float, Any]] = []
        self.voters = {
            cid: Voter(StateDirectory(directory / str(cid)), KEYS[cid], clock=self.clock) for cid in range(1, 5)
        }
        for cid, voter in self.voters.items():
            voter.follow(self.signed, cid)
        self.requests = {cid: self.serve(cid) for cid in self.voters}

    def serve(self, cid: int) -> VotingRequests:
        def held() -> SignedDocument:
            found = self.voters[cid].held
            assert found is not None
            return found

        return VotingRequests(
            self.voters[cid],
            cast(Handover, None),
            offer_document=lambda _, data: self.take(cid, data),
            document=held,
            refused=lambda *_: None,
        )

    def take(self, cid: int, data: bytes) -> None:
        offered = SignedDocument.unpack(data)
        if self.voters[cid].may_take(offered):
            self.voters[cid].follow(offered, cid)

    def campaign(self, cid: int, heard: int = 0) -> Campaign:
        def ask(target: int, message: Mapping[str, Any], answer: Answer, parts: Sequence[bytes]) -> bool:
            if target in self.away:
                return False

            def send(reply: Mapping[str, Any], attachments: Attachments) -> bool:
                given = [part for part in attachments if isinstance(part, bytes)]
                self.later(lambda: answer(dict(reply), given))
                return True

            request: Message = {**message, "id": 1}
            self.later(lambda: self.requests[target].handle(cid, send, request, parts))
            return True

        return Campaign(
            cid,
            self.voters[cid],
            ask=ask,
            offer_document=lambda _, data: self.take(cid, data),
            heard_epoch=heard,
            clock=self.clock,
        )

    def later(self, what: Any) -> None:
        self.under_way.append((self.clock.now + self.random.choice(DELAYS_S), what))

    def run(self, *campaigns: Campaign, within_s: float) -> float:
        """Let time pass until somebody has won; returns how long that took."""
        begun = self.clock.now
        while self.clock.now - begun < within_s:
            for campaign in campaigns:
                cid = campaign.candidacy.ballot.candidate
                campaign.tick([other for other in self.voters if other not in {cid, *self.away}])
            if any(campaign.won for campaign in campaigns):
                return self.clock.now - begun
            self.clock.now += STEP_S
            due = [what for at, what in self.under_way if at <= self.clock.now]
            self.under_way = [one for one in self.under_way if one[0] > self.clock.now]
            for what in due:
                what()
        raise AssertionError(f"nobody has won within {within_s} s: {[one.problems() for one in campaigns]}")


def test_it_waits_for_the_promises_to_the_master(tmp_path: Path) -> None:
    members = Members(tmp_path, 1)
    for cid in (2, 3, 4):
        members.voters[cid].acknowledge(1, 1, Request(7, 1))
    members.clock.now += 4
    campaign = members.campaign(2)
    took = members.run(campaign, within_s=20)
    assert took == pytest.approx(LEASE_S - 4, abs=1.2), "voters are asked again when their promise is over"
    assert set(campaign.candidacy.votes) >= {2} and campaign.candidacy.ballot.epoch == 2


@pytest.mark.parametrize("seed", range(20))
def test_of_two_rivals_one_wins_soon(tmp_path: Path, seed: int) -> None:
    members = Members(tmp_path, seed)
    members.away = {1, 4} if seed % 2 else {1}
    if 4 in members.away:
        members.away = {1}
        members.voters[4].vote(members.signed.ballot(2, 3))  # one of the two has a head start
    rivals = [members.campaign(cid) for cid in (2, 3)]
    members.run(*rivals, within_s=20 * RIVAL_S)
    won = [one for one in rivals if one.won]
    assert len(won) == 1
    winner = won[0].candidacy
    made = winner.document(fork=None, start=None, when=1, reason="a test")
    signed = sign(made, made.master, KEYS[made.master].sign_private, after=members.signed)
    for cid in (2, 3, 4):
        voter = members.voters[cid]
        # Who has voted in a later epoch meanwhile waits for one that is beyond that: the new master renews its epoch.
        assert voter.may_take(signed) is (voter.record.epoch <= made.epoch)


def test_voters_with_an_older_document_are_brought_up_to_date(tmp_path: Path) -> None:
    members = Members(tmp_path, 3)
    newer = sign(with_fence(members.signed.document, "none"), 1, KEYS[1].sign_private, after=members.signed)
    members.voters[2].follow(newer, 2)
    campaign = members.campaign(2)
    members.run(campaign, within_s=5)
    assert all(members.voters[cid].held == newer for cid in (3, 4)) and campaign.candidacy.held == newer


def test_it_goes_beyond_an_epoch_that_a_voter_has_voted_in(tmp_path: Path) -> None:
    members = Members(tmp_path, 4)
    for cid in (3, 4):
        members.voters[cid].vote(members.signed.ballot(7, 4))
    campaign = members.campaign(2)
    members.run(campaign, within_s=5)
    assert campaign.candidacy.ballot.epoch == 8
