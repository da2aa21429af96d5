"""What a broker answers to members that ask for acknowledgements and votes, over its control port."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from broker.cluster.remote import remote_member
from broker.cluster.state_directory import StateDirectory
from pmgsync.core.membership import SignedDocument, sign
from pmgsync.core.votes import Vote
from pmgsync.wire.messages import Message
from pmgsync.wire.peer import Peer
from tests.harness.brokers import FaultyBroker, document_of
from tests.harness.cluster import eventually
from tests.harness.strangers import answers_status

pytestmark = pytest.mark.cluster


class Electorate:
    """The broker of CID 2, and the connections to it of the master (1) and of another member (3), which do not run."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.brokers = [FaultyBroker(directory, f"node{cid}") for cid in (1, 2, 3)]
        for broker in self.brokers:
            stack.callback(broker.close)
        self.signed = document_of(self.brokers)
        self.voter = self.brokers[1]
        StateDirectory(self.voter.state_dir).store_document(self.signed)
        self.voter.start()
        eventually(lambda: answers_status(self.voter), what="the broker serves")
        member = self.signed.document.member(2)
        assert member is not None
        self.peers: dict[int, Peer] = {
            cid: stack.enter_context(remote_member(member, StateDirectory(self.brokers[cid - 1].state_dir).keys()))
            for cid in (1, 3)
        }

    def ask(self, cid: int, message: Message, *attachments: bytes) -> tuple[Message, list[bytes]]:
        """Return the answer to a request of a member, an error as it is."""
        peer = self.peers[cid]
        request = peer.new_id()
        peer.send({**message, "id": request}, *attachments)
        while (received := peer.receive(10)) is not None:
            if received[0].get("id") == request:
                return received[0], list(received[1])
        raise AssertionError("no answer")

    def lease(self, cid: int, number: int = 1, epoch: int = 1) -> Message:
        return self.ask(cid, {"op": "lease", "epoch": epoch, "run": 9, "number": number})[0]

    def vote(self, cid: int, epoch: int, *, base: SignedDocument | None = None) -> tuple[Message, list[bytes]]:
        base = base or self.signed
        return self.ask(cid, {"op": "vote", "ballot": base.ballot(epoch, cid).to_map()}, base.pack())

    def later(self) -> SignedDocument:
        """Return a newer document of the same master."""
        changed = replace(self.signed.document, serial=self.signed.document.serial + 1)
        return sign(changed, 1, StateDirectory(self.brokers[0].state_dir).keys().sign_private, after=self.signed)


@pytest.fixture
def electorate(tmp_path: Path) -> Iterator[Electorate]:
    with ExitStack() as stack:
        yield Electorate(tmp_path, stack)


def test_a_master_is_acknowledged_and_others_wait(electorate: Electorate) -> None:
    answer = electorate.lease(1)
    assert answer["op"] == "done"
    assert answer["result"] == {"epoch": 1, "serial": electorate.signed.document.serial}
    refused, _ = electorate.vote(3, 2)
    assert refused["op"] == "error"
    assert 0 < refused["wait_s"] <= 10
    assert refused["recoverable"]
    assert refused["epoch"] == 1
    assert not refused["documents_differ"]
    electorate.peers[1].send({"op": "lease.release", "run": 9, "number": 1})
    electorate.ask(1, {"op": "ping"})
    answer, _ = electorate.vote(3, 2)
    vote = Vote.from_map(answer["result"]["vote"])
    sign_key = StateDirectory(electorate.voter.state_dir).keys().sign_public
    assert electorate.signed.ballot(2, 3).proves(vote, sign_key)
    refused = electorate.lease(1, 2)
    assert refused["op"] == "error"
    assert refused["epoch"] == 2


def test_a_vote_survives_the_death_of_the_broker(electorate: Electorate) -> None:
    assert electorate.vote(3, 2)[0]["op"] == "done"
    electorate.voter.kill()
    electorate.voter.start()
    eventually(lambda: answers_status(electorate.voter))
    refused, _ = electorate.vote(1, 2)
    assert refused["op"] == "error"
    assert electorate.vote(1, 3)[0]["op"] == "done"


def test_who_is_no_master_is_answered_with_the_document(electorate: Electorate) -> None:
    refused, documents = electorate.ask(3, {"op": "lease", "epoch": 1, "run": 9, "number": 1})
    assert refused["documents_differ"]
    assert SignedDocument.unpack(documents[0]).body == electorate.signed.body
    assert electorate.lease(1, epoch=2)["documents_differ"]


def test_a_candidates_newer_document_is_taken_before_the_vote(electorate: Electorate) -> None:
    later = electorate.later()
    assert electorate.vote(3, 2, base=later)[0]["op"] == "done"
    assert StateDirectory(electorate.voter.state_dir).document() == later
    refused, documents = electorate.vote(3, 3)
    assert refused["documents_differ"]
    assert documents == [later.pack()]


@pytest.mark.parametrize(
    "message",
    [
        {"op": "lease"},
        {"op": "lease", "epoch": -1, "run": 1, "number": 1},
        {"op": "lease", "epoch": 1, "run": "x", "number": 1},
        {"op": "lease.release", "run": 1},
        {"op": "vote"},
        {"op": "vote", "ballot": {}},
        {"op": "vote", "ballot": {"cluster": "zz", "base": "", "epoch": 1, "candidate": 3}},
        {"op": "vote", "ballot": {"cluster": "", "base": "", "epoch": 2**70 % 2**63, "candidate": 3}},
        {"op": "offer"},
    ],
)
def test_nonsense_is_refused(electorate: Electorate, message: Message) -> None:
    answer, _ = electorate.ask(3, message)
    assert answer["op"] == "error"
    assert answer["error"] == "bad_request"
    assert answers_status(electorate.voter)


def test_a_member_asks_for_itself_only(electorate: Electorate) -> None:
    answer, _ = electorate.ask(1, {"op": "vote", "ballot": electorate.signed.ballot(2, 3).to_map()})
    assert answer["error"] == "bad_request"
    assert electorate.vote(3, 2)[0]["op"] == "done", "nothing was voted"


def test_a_damaged_record_is_told_in_status(electorate: Electorate) -> None:
    assert electorate.vote(3, 2)[0]["op"] == "done"
    electorate.voter.kill()
    StateDirectory(electorate.voter.state_dir).votes_path.write_bytes(b"{")
    electorate.voter.start()
    eventually(lambda: answers_status(electorate.voter))
    assert electorate.vote(3, 3)[0]["op"] == "error"
    alerts = electorate.voter.status()[2]["alerts"]
    assert any(alert["kind"] == "votes" and "damaged" in alert["text"] for alert in alerts)
