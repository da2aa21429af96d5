"""What members ask of this one as a voter: acknowledgements of the master, votes, that the master hands over; and
documents they offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker.leadership.handover import Handover
from broker.leadership.voter import Voter
from broker.members.calls import Send
from broker.requests.shared import number
from pmgsync.core.epochs import Refused
from pmgsync.core.lease import Request
from pmgsync.core.membership import SignedDocument
from pmgsync.core.votes import Ballot
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError
from pmgsync.wire.messages import Message, error_map


class VotingRequests:
    """Answers on the control ROUTER."""

    def __init__(
        self,
        voter: Voter,
        handover: Handover,
        *,
        offer_document: Callable[[int, bytes], None],
        document: Callable[[], SignedDocument],
        refused: Callable[[int, PmgsyncError], None],
    ) -> None:
        """Begin.

        Args:
            offer_document: takes the CID of a member and the packed document that it offers; raises PmgsyncError when
                it is not acceptable.
            document: returns the cluster document in force.
            refused: has status show why something that a member sent was refused.
        """
        self._voter = voter
        self._handover = handover
        self._offer_document = offer_document
        self._document = document
        self._refused = refused

    def handle(self, cid: int, send: Send, message: Message, attachments: Sequence[bytes]) -> bool:
        """Handle a member's request; False when it is none of these.

        Raises:
            PmgsyncError: when it is malformed.
        """
        match message["op"]:
            case "lease":
                request, answer = (
                    number(message, "id"),
                    self._voter.acknowledge(
                        cid, number(message, "epoch"), Request(number(message, "run"), number(message, "number"))
                    ),
                )
                if isinstance(answer, Refused):
                    self._refuse(send, request, answer)
                else:
                    send({"op": "done", "id": request, "result": self._version()}, ())
            case "lease.release":
                self._voter.release(cid, Request(number(message, "run"), number(message, "number")))
            case "vote":
                self._vote(cid, send, message, attachments)
            case "handover":
                self._handover.ask(cid, send, number(message, "id"), number(message, "epoch"))
            case "handover.cancel":
                self._handover.cancel(cid)
            case "offer":
                if len(attachments) != 1:
                    raise ProtocolError("an offer is one document")
                self._offer_document(cid, attachments[0])
            case _:
                return False
        return True

    def _version(self) -> dict[str, int]:
        epoch, serial = self._document().document.version
        return {"epoch": epoch, "serial": serial}

    def _vote(self, cid: int, send: Send, message: Message, attachments: Sequence[bytes]) -> None:
        request, described = number(message, "id"), message.get("ballot")
        if not isinstance(described, dict):
            raise ProtocolError("a request for a vote has no ballot")
        ballot = Ballot.from_map(described)
        if ballot.candidate != cid:
            raise ProtocolError(f"node {cid} asks for votes for node {ballot.candidate}")
        if attachments:
            try:
                self._offer_document(cid, attachments[0])
            except PmgsyncError as error:
                self._refused(cid, error)
        answer = self._voter.vote(ballot)
        if isinstance(answer, Refused):
            self._refuse(send, request, answer)
        else:
            send({"op": "done", "id": request, "result": {"vote": answer.to_map()}}, ())

    def _refuse(self, send: Send, request: int, refused: Refused) -> None:
        error = MembershipError(refused.reason)
        error.recoverable = refused.wait_s > 0 or refused.documents_differ
        held = (self._document().pack(),) if refused.documents_differ else ()
        reply = {
            **error_map(request, error),
            "wait_s": refused.wait_s,
            "epoch": refused.epoch,
            "documents_differ": refused.documents_differ,
        }
        send(reply, held)
