"""What a node in a cluster has to lead it, or to become the one that does: lease, survey, handover and promotion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from broker.chains.chains import Chains
from broker.leadership import promotion_run
from broker.leadership.asking import Answer
from broker.leadership.handover import Handover
from broker.leadership.lease import LeaseKeeper, Surroundings
from broker.leadership.promotion import Promotion
from broker.leadership.survey import Survey
from broker.leadership.voter import Voter
from broker.members.calls import End
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.core.promotion import Way
from pmgsync.core.stretches import Stretch
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.wire.messages import Message

RENEW_S = 5.0
"""For so long, at least two leases, a master waits for whoever has got votes for a later epoch than its own."""
RENEW_AGAIN_S = 30.0


@dataclass(frozen=True)
class Around:
    """What leading needs of the broker around it.

    Attributes:
        document: returns the document in force.
        change_document: signs, stores and puts in force a new one of this master's.
        begin_epoch: likewise the first one of an epoch of this node.
        offer_document: takes a CID and the packed document that it offers.
        ask: sends a member a request, and the answer to a function.
        tell_agent: sends the lease worker a message; False when there is none.
        ask_agent: has this node's agent answer a call, by its method when no message is given.
        trees: returns what this node's agent says of its trees of files.
    """

    document: Callable[[], SignedDocument]
    change_document: Callable[[ClusterDocument], object]
    begin_epoch: Callable[[ClusterDocument], object]
    offer_document: Callable[[int, bytes], None]
    ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool]
    tell_agent: Callable[[Message], bool]
    ask_agent: Callable[[End, str, Message | None], None]
    trees: Callable[[], Iterable[Mapping[str, Any]]]


class Leadership:
    """Made with what they need of each other.

    Attributes:
        lease: keeps the master's lease.
        survey: says what a promotion would do.
        handover: closes this node, the master, for another.
        promotion: makes this node the master.
    """

    def __init__(
        self, cid: int, voter: Voter, members: Members, chains: Chains, divergence: DivergenceFiles, around: Around
    ) -> None:
        def document() -> ClusterDocument:
            return around.document().document

        self._chains = chains
        self._voter = voter
        self._document = document
        self._cid = cid
        self._renew_at = 0.0
        self._voted_at = time.monotonic()

        self.lease = LeaseKeeper(
            cid,
            voter,
            Surroundings(
                document=around.document,
                change_document=around.change_document,
                offer_document=around.offer_document,
                ask=lambda target, message, answer: around.ask(target, message, answer, ()),
                send=members.send,
                refused=members.refuse,
                tell_agent=around.tell_agent,
                ask_agent=lambda caller, method: around.ask_agent(caller, method, None),
            ),
        )
        self.survey = Survey(cid, members, chains, voter, document=document)
        self.handover = Handover(
            cid,
            chains,
            members,
            self.lease,
            document=document,
            leads=lambda: voter.may_lead,
            ask_agent=lambda caller, method: around.ask_agent(caller, method, None),
        )
        self.promotion = Promotion(
            cid,
            voter,
            self.survey,
            self.lease,
            chains,
            divergence,
            promotion_run.Surroundings(
                document=document,
                begin_epoch=around.begin_epoch,
                offer_document=around.offer_document,
                ask=around.ask,
                send=members.send,
                ask_agent=around.ask_agent,
                trees=around.trees,
            ),
        )

    def agent_told(self, message: Message) -> None:
        """Take what the lease worker says of a deadline that it has written; raises ProtocolError."""
        reign = message.get("reign", 0)
        self.lease.agent_told(
            message["number"] if type(message.get("number")) is int else 0,
            guarded=message.get("guarded") is True,
            opened=message.get("open") is True,
            reign=reign if type(reign) is int else 0,
        )

    def follow_document(self) -> None:
        """Bring everything in line with the document in force."""
        self.lease.follow_document()
        self.promotion.follow_document()

    def plan(self, *, force: bool) -> dict[str, Any]:
        """Return the map of `pmgcm promote --dry-run --json`."""
        plan = self.survey.plan(force=force)
        described = self.survey.describe(plan)
        if plan.way is Way.IS_MASTER and not self.promotion.is_through:
            described |= {"way": "unfinished", "reason": "this node is master, but its tables are not open yet"}
        return described

    def trimmed(self, stretch: Stretch, *, leads: bool) -> Stretch:
        """Return a stretch without what is known to be empty of it.

        Args:
            leads: this node becomes the master with what it has: what nobody could be given frame by frame is fetched
                from it.
        """
        whole = self.survey.whole(stretch.origin, stretch.incarnation, stretch.after)
        stretch = replace(stretch, after=min(whole, stretch.limit))
        applied = self._chains.applied.get(stretch.origin)
        if leads and applied is not None and applied.incarnation == stretch.incarnation:
            stretch = stretch.ended(applied.position.lsn)
            if not stretch.empty:
                return replace(stretch, exported=True, lost=True)
            return replace(stretch, upto=None)  # the worker of the chain looks at its tables
        return stretch

    @property
    def hurries(self) -> bool:
        """True while nobody can write because a master is to be another."""
        return self.promotion.is_under_way or self.handover.is_under_way

    def tick(self) -> None:
        """Do what is due."""
        self.lease.tick()
        self.hurry()
        self._renew()

    def _renew(self) -> None:
        """Begin a later epoch of this master when votes were given for one in which nobody became master.

        Of two that are promoted at once the one who gives way has got votes, perhaps, after the other has won; and the
        master itself may have voted for a node that has died since. Who has voted takes nothing earlier any more.
        """
        now, document = time.monotonic(), self._document()
        if not self._voter.has_voted_away:
            self._voted_at = now
        if document.master != self._cid or self.hurries or self.lease.is_released or now < self._renew_at:
            return
        patience_s = max(RENEW_S, 2 * document.lease_ms / 1000)
        behind = [cid for cid, since in self.lease.beyond.items() if now - since > patience_s]
        seen = self.survey.others()
        behind = [cid for cid in behind if cid in seen and seen[cid].answers and seen[cid].version <= document.version]
        if behind or now - self._voted_at > patience_s:
            self._renew_at = now + RENEW_AGAIN_S
            self.promotion.renew()

    def hurry(self) -> None:
        """Do what is due while somebody waits for it."""
        self.handover.tick()
        self.promotion.tick()
