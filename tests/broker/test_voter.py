"""The voter: what it has promised and voted survives a crash, and what cannot be read binds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.cluster.state_directory import StateDirectory
from broker.leadership.voter import Voter
from broker.net.keys import KeyPair, NodeKeys
from pmgsync.core.epochs import Candidacy, Granted, Refused
from pmgsync.core.lease import Request
from pmgsync.core.membership import Member, SignedDocument, first_document, sign, with_fence, with_member
from pmgsync.core.votes import Vote
from pmgsync.errors import ConfigError
from tests.harness.broker_process import CLUSTER

SEEDS = [bytes([number]) * 32 for number in range(5)]
KEYS = [NodeKeys(KeyPair(seed, seed, Ed25519PrivateKey.from_private_bytes(seed))) for seed in SEEDS]
LEASE_S = 10.0
EPOCH = 1


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A member with CID 2 of a cluster of four; its master is CID 1."""

    def __init__(self, directory: Path) -> None:
        self.state = StateDirectory(directory / "state")
        self.clock = Clock()
        self.signed = document(range(1, 5))
        self.voter = self.start()

    def start(self, *, cid: int = 2, signed: SignedDocument | None = None) -> Voter:
        """Start the broker anew."""
        self.voter = Voter(self.state, KEYS[cid], clock=self.clock)
        self.voter.follow(signed or self.signed, cid)
        return self.voter

    def ask(self, candidate: int, epoch: int) -> Vote | Refused:
        return self.voter.vote(self.signed.ballot(epoch, candidate))


def document(cids: Sequence[int], cluster: bytes = CLUSTER) -> SignedDocument:
    members = [Member(cid, f"node{cid}", f"192.0.2.{cid}", 1, 2, 3, SEEDS[cid], KEYS[cid].sign_public) for cid in cids]
    found = first_document(cluster, "test", "mirror", members[0])
    for member in members[1:]:
        found = with_member(found, member)
    return sign(with_fence(found, "lease"), cids[0], KEYS[cids[0]].sign_private)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_vote_is_given_once_an_epoch_whatever_crashes(world: World) -> None:
    given = world.ask(3, 2)
    assert isinstance(given, Vote)
    assert world.signed.ballot(2, 3).proves(given, KEYS[2].sign_public)
    for _ in range(2):
        assert world.ask(3, 2) == given, "the same vote may be given again"
        refused = world.ask(4, 2)
        assert isinstance(refused, Refused)
        assert refused.epoch == 2
        world.start()
    assert isinstance(world.ask(4, 3), Vote)
    assert world.state.votes_path.stat().st_mode & 0o777 == 0o600


def test_a_promise_binds_for_a_lease_also_after_a_crash(world: World) -> None:
    assert isinstance(world.voter.acknowledge(1, EPOCH, Request(7, 1)), Granted)
    world.clock.now += 4
    refused = world.ask(3, 2)
    assert isinstance(refused, Refused)
    assert refused.wait_s == pytest.approx(LEASE_S - 4)
    world.start()
    refused = world.ask(3, 2)
    assert isinstance(refused, Refused)
    assert refused.wait_s == pytest.approx(LEASE_S), "what was promised just before the crash is not known"
    assert isinstance(world.voter.acknowledge(1, EPOCH, Request(7, 2)), Granted), "the same master may go on"
    world.clock.now += LEASE_S
    assert isinstance(world.ask(3, 2), Vote)
    assert isinstance(world.voter.acknowledge(1, EPOCH, Request(7, 3)), Refused), "who has voted follows no more"


def test_a_member_that_has_promised_nothing_need_not_wait_after_a_start(world: World) -> None:
    world.start()
    assert isinstance(world.ask(3, 2), Vote)


def test_a_master_that_let_go_binds_nobody(world: World) -> None:
    world.voter.acknowledge(1, EPOCH, Request(7, 2))
    world.voter.release(1, Request(7, 1))
    assert isinstance(world.ask(3, 2), Refused), "it was acknowledged after that"
    world.voter.release(1, Request(7, 2))
    assert isinstance(world.ask(3, 2), Vote)


def test_what_a_vote_does_not_include_is_not_taken(world: World) -> None:
    later = document(range(1, 5))
    changed = replace(later.document, serial=later.document.serial + 1)
    offered = sign(changed, 1, KEYS[1].sign_private, after=world.signed)
    assert world.voter.may_take(offered)
    world.ask(3, 2)
    world.start()
    assert not world.voter.may_take(offered)


def test_a_master_that_has_voted_for_another_does_not_lead(world: World) -> None:
    assert world.start(cid=1).may_lead
    assert world.voter.begin_asking() == 0
    held = world.voter.lease.acknowledged(3, world.clock.now).acknowledged(4, world.clock.now)
    world.voter.lease = held.tell(held.until(world.signed.document))
    refused = world.ask(3, 2)
    assert isinstance(refused, Refused)
    assert refused.wait_s == pytest.approx(LEASE_S * 0.9), "its own lease"
    world.clock.now += LEASE_S
    assert isinstance(world.ask(3, 2), Vote)
    assert not world.voter.may_lead
    assert not world.start(cid=1).may_lead


def test_a_master_that_was_restarted_asks_at_once_and_votes_for_nobody_else_for_a_lease(world: World) -> None:
    world.start(cid=1).begin_asking()
    voter = world.start(cid=1)
    assert voter.begin_asking() == 0
    refused = world.ask(3, 2)
    assert isinstance(refused, Refused)
    assert refused.wait_s == pytest.approx(LEASE_S)


def test_a_masters_lease_binds_it_also_in_the_document_that_comes_after(world: World) -> None:
    voter = world.start(cid=1)
    voter.begin_asking()
    voter.lease = voter.lease.acknowledged(2, world.clock.now).acknowledged(3, world.clock.now)
    voter.lease = voter.lease.tell(voter.lease.until(world.signed.document))
    assert voter.bound_s(2) == pytest.approx(LEASE_S * 0.9)
    candidacy = Candidacy.of(world.signed, 3, 2)
    for cid in (2, 3, 4):
        candidacy = candidacy.with_vote(candidacy.ballot.sign(cid, KEYS[cid].sign_private))
    new = candidacy.document(fork=None, start=None, when=1, reason="voted")
    later = sign(new, 3, KEYS[3].sign_private, after=world.signed)
    assert voter.may_take(later)
    voter.follow(later, 1)
    assert voter.bound_s(3) == pytest.approx(LEASE_S * 0.9)
    assert not voter.may_lead
    voter.closed()
    assert voter.bound_s(3) == 0


def test_a_record_belongs_to_one_cluster_and_one_number_in_it(world: World) -> None:
    assert isinstance(world.ask(3, 2), Vote)
    elsewhere = document(range(1, 5), b"another cluster!")
    voter = world.start(signed=elsewhere)
    assert isinstance(voter.vote(elsewhere.ballot(2, 4)), Vote)
    voter = world.start(cid=4)
    assert isinstance(world.ask(3, 2), Vote)
    world.state.forget_cluster()
    assert not world.state.votes_path.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"7", b'{"cluster": 1}', b"\xff\x00"])
def test_a_damaged_record_lets_a_node_follow_and_nothing_else(world: World, damage: bytes) -> None:
    assert isinstance(world.ask(3, 2), Vote)
    world.state.votes_path.write_bytes(damage)
    voter = world.start()
    assert "damaged" in voter.problem
    assert "delete this node" in voter.problem
    assert isinstance(world.ask(3, 3), Refused)
    assert isinstance(voter.acknowledge(1, EPOCH, Request(1, 1)), Refused)
    changed = replace(world.signed.document, serial=world.signed.document.serial + 1)
    assert voter.may_take(sign(changed, 1, KEYS[1].sign_private, after=world.signed))
    assert not world.start(cid=1).may_lead
    assert world.state.votes_path.read_bytes() == damage, "what cannot be read is not overwritten"


def test_what_cannot_be_written_is_not_promised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: bytes) -> None:
        raise ConfigError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(world.state, "store_votes", full)
        assert isinstance(world.ask(3, 2), Refused)
        assert isinstance(world.voter.acknowledge(1, EPOCH, Request(1, 1)), Refused)
        assert "no space" in world.voter.problem
    assert isinstance(world.ask(4, 2), Vote), "nothing was promised"
    assert not world.voter.problem
