"""What a node in a cluster has to lead it, or to become the one that does: lease, survey, handover and promotion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.chains.chains import Chains
from broker.leadership import promotion
from broker.leadership.asking import Answer
from broker.leadership.handover import Handover
from broker.leadership.lease import LeaseKeeper, Surroundings
from broker.leadership.promotion import Promotion
from broker.leadership.survey import Survey
from broker.leadership.voter import Voter
from broker.members.calls import End
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.wire.messages import Message


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
    """

    document: Callable[[], SignedDocument]
    change_document: Callable[[ClusterDocument], object]
    begin_epoch: Callable[[ClusterDocument], object]
    offer_document: Callable[[int, bytes], None]
    ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool]
    tell_agent: Callable[[Message], bool]
    ask_agent: Callable[[End, str, Message | None], None]


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
            promotion.Surroundings(
                document=document,
                begin_epoch=around.begin_epoch,
                offer_document=around.offer_document,
                ask=around.ask,
                send=members.send,
                ask_agent=around.ask_agent,
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

    def tick(self) -> None:
        """Do what is due of the lease."""
        self.lease.tick()

    def hurry(self) -> None:
        """Do what is due while somebody waits for it."""
        self.handover.tick()
        self.promotion.tick()
