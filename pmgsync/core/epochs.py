"""Epochs: whom a member votes for, whose requests it acknowledges, and which document it accepts. Pure.

Every function decides by its arguments and changes nothing. What a member must remember over a crash is its `Record`;
a caller that gets one back writes it to disk *before* it sends anything that follows from it.

Invariants, for any losses, delays, repeats, crashes and partitions:

1. A member votes at most once an epoch, and in growing epochs (`Record.epoch`).
2. At most one master has the votes of a majority for an epoch, since two majorities have a member in common.
3. A document that a majority holds is in every later epoch that was voted for: a voter holds exactly the document that
   the epoch was made from, and after its vote it takes and acknowledges nothing of an earlier epoch.
4. No two leases overlap (`lease`): a vote is given only to the master that one is promised to, or when the promise is
   over.

What a forced promotion breaks, it breaks visibly: it is marked for good, and 2 to 4 hold again among those who follow
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pmgsync.core.document import ClusterDocument, Fork
from pmgsync.core.lease import Promise
from pmgsync.core.membership import new_epoch
from pmgsync.core.signed import SignedDocument, accept_document
from pmgsync.core.votes import Ballot, Vote
from pmgsync.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Record:
    """What a member keeps on disk. A master names itself in it before it sends its first request.

    Attributes:
        epoch: the newest epoch that it has voted in, 0: none.
        ballot: what it voted for then.
        promised: CID of the master that it acknowledges, 0: none.
    """

    epoch: int = 0
    ballot: Ballot | None = None
    promised: int = 0

    def to_map(self) -> dict[str, Any]:
        ballot = None if self.ballot is None else self.ballot.to_map()
        return {"epoch": self.epoch, "ballot": ballot, "promised": self.promised}

    @classmethod
    def from_map(cls, data: Mapping[str, Any]) -> Record:
        """Return the record a map describes.

        Raises:
            ProtocolError: when it is malformed. Then the member must not vote: what it has promised is not known.
        """
        epoch, ballot, promised = data.get("epoch"), data.get("ballot"), data.get("promised")
        if type(epoch) is not int or type(promised) is not int or min(epoch, promised) < 0:
            raise ProtocolError("a member's record of its votes has no epoch or no promise")
        if not (ballot is None or isinstance(ballot, Mapping)):
            raise ProtocolError("a member's record of its votes has a ballot that cannot be read")
        return cls(epoch, None if ballot is None else Ballot.from_map(ballot), promised)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a vote or an acknowledgement is not given.

    Attributes:
        reason: one sentence without a final full stop, for whoever asked.
        wait_s: seconds after which it may be given, 0.0 when waiting does not help.
        epoch: the newest epoch known here; a candidate must go beyond it.
        documents_differ: the two must exchange their documents first.
    """

    reason: str
    wait_s: float = 0.0
    epoch: int = 0
    documents_differ: bool = False


@dataclass(frozen=True, slots=True)
class Granted:
    """A vote or an acknowledgement is given, when the record is on disk."""

    record: Record


def may_vote(
    cid: int, held: SignedDocument, record: Record, promise: Promise, ballot: Ballot, now: float
) -> Granted | Refused:
    """Decide on a request for a vote.

    Args:
        cid: this member.
        promise: of this member, its own lease included when it is the master and has not let go.
        now: seconds of this member's clock.
    """
    document = held.document
    newest = max(document.epoch, record.epoch)
    if ballot.cluster != document.cluster:
        return Refused("the vote is for another cluster")
    if cid not in document.voters:
        return Refused(f"CID {cid} has no vote", epoch=newest)
    if record.ballot == ballot and record.epoch == ballot.epoch:
        return Granted(record)
    if ballot.epoch <= newest:
        what = "has voted in" if record.epoch >= ballot.epoch else "knows of"
        return Refused(f"CID {cid} {what} epoch {newest} already", epoch=newest)
    if ballot != held.ballot(ballot.epoch, ballot.candidate):
        return Refused("the candidate holds another cluster document", epoch=newest, documents_differ=True)
    candidate = document.member(ballot.candidate)
    if candidate is None or not candidate.may_be_master:
        return Refused(f"CID {ballot.candidate} cannot be master", epoch=newest)
    wait_s = promise.binds_against(ballot.candidate, now)
    if wait_s > 0:
        whom = f"has promised itself to CID {promise.master}" if promise.request else "was started"
        return Refused(f"CID {cid} {whom} less than a lease ago", wait_s, newest)
    return Granted(Record(ballot.epoch, ballot, record.promised))


def may_acknowledge(
    document: ClusterDocument, record: Record, promise: Promise, epoch: int, master: int, now: float
) -> Granted | Refused:
    """Decide on a master's request for an acknowledgement. Whoever gives it then has to keep `Promise.given`."""
    newest = max(document.epoch, record.epoch)
    if epoch < newest:
        return Refused(f"epoch {newest} is known here", epoch=newest)
    if epoch > document.epoch or master != document.master:
        return Refused(
            f"CID {master} is not known here as master of epoch {epoch}", epoch=newest, documents_differ=True
        )
    wait_s = promise.binds_against(master, now)
    if wait_s > 0:
        return Refused(f"another master was promised to, or may have been, for {wait_s:.1f} s more", wait_s, newest)
    return Granted(record if record.promised == master else Record(record.epoch, record.ballot, master))


def may_lead(cid: int, document: ClusterDocument, record: Record) -> bool:
    """Say whether a node acts as master: asks for acknowledgements, opens its tables, changes the document.

    A node that has voted in a later epoch, also for itself, does not any more: the vote does not include what it would
    do now. If nobody wins, it becomes a candidate itself, for a later epoch.
    """
    return document.master == cid and record.epoch <= document.epoch


def may_take(held: ClusterDocument, record: Record, offered: SignedDocument) -> bool:
    """Say whether an offered document is to be taken in the place of the one held.

    Raises:
        MembershipError: as `signed.accept_document`.
    """
    # A voter must not hold a document that its vote does not include: it would seem to acknowledge it.
    return offered.document.epoch >= record.epoch and accept_document(held, offered)


def next_epoch(held: ClusterDocument, record: Record, heard: int = 0) -> int:
    """Return the epoch that a candidate asks votes for; `heard` is the newest that a refusal named."""
    return max(held.epoch, record.epoch, heard) + 1


@dataclass(frozen=True, slots=True)
class Candidacy:
    """What a candidate asks for and has been given. It is lost with a crash; the next one is for a later epoch."""

    held: SignedDocument
    ballot: Ballot
    votes: Mapping[int, Vote] = field(default_factory=dict)

    @classmethod
    def of(cls, held: SignedDocument, candidate: int, epoch: int) -> Candidacy:
        return cls(held, held.ballot(epoch, candidate))

    def with_vote(self, vote: Vote) -> Candidacy:
        """Return the candidacy with one more vote; one that proves nothing is left out."""
        voter = self.held.document.member(vote.cid)
        if voter is None or not voter.votes or not self.ballot.proves(vote, voter.sign_key):
            return self
        return replace(self, votes={**self.votes, vote.cid: vote})

    def lacks_own(self) -> bool:
        """True when the candidate's own vote is all that is missing.

        It votes last: a node that has voted does not follow the master any more, so a candidate that nobody votes for
        would lock itself out.
        """
        cid = self.ballot.candidate
        return cid not in self.votes and self.held.document.is_majority({cid, *self.votes})

    def is_won(self, held: SignedDocument, record: Record) -> bool:
        """True when a majority has voted, and this node has neither taken another document nor voted again since."""
        return (
            self.held.document.is_majority(self.votes) and held.body == self.held.body and record.ballot == self.ballot
        )

    def document(self, *, fork: Fork | None, start: Fork | None, when: int, reason: str) -> ClusterDocument:
        """Return the first document of the epoch; sign it `after` the one held, and store it before it is sent."""
        return new_epoch(
            self.held.document,
            self.ballot.candidate,
            epoch=self.ballot.epoch,
            fork=fork,
            start=start,
            when=when,
            reason=reason,
            votes=[self.votes[cid] for cid in sorted(self.votes)],
        )
