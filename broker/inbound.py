"""The one door for whatever members send on their own account: events, and answers to what this node has asked.

Live and replayed frames both come through here and go on to the same follower. What members ask of this node comes in
at the control port (`broker.requests.control`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import zmq

from broker.chains.chains import Chains
from broker.heartbeats.heartbeat import Heartbeat
from broker.leadership.splits import Splits, is_known
from broker.members.calls import Calls
from broker.members.link import MemberLink
from broker.members.members import Members, peer
from broker.requests.shared import check_id
from pmgsync.core.allowance import Allowance
from pmgsync.core.announcements import MAX_ANNOUNCEMENT
from pmgsync.core.frames import Frame, read_frame, read_frames
from pmgsync.core.membership import ClusterDocument
from pmgsync.errors import (
    FrameDamagedError,
    PmgsyncError,
    ProtocolError,
    UnknownOperationError,
    UnreachableError,
)
from pmgsync.wire.messages import Message, error_from, unpack

ANNOUNCED_BYTES_S = 4 << 20
"""Of each member's announcements so much is handed on in a second. Its trees are announced again and again, and who has
missed one asks for the difference; without a bound they would pile up before a worker that is busy."""


class Inbound:
    """Checks what comes over the links and passes it on."""

    def __init__(
        self,
        members: Members,
        chains: Chains,
        calls: Calls,
        *,
        document: Callable[[], ClusterDocument],
        offer_document: Callable[[int, bytes], None],
        new_id: Callable[[], int],
        announced: Callable[[int, bytes], None],
        splits: Splits,
    ) -> None:
        """Begin.

        Args:
            document: returns the cluster document in force.
            offer_document: takes the CID of a member and the packed document that it offers; raises PmgsyncError when
                it is not acceptable.
            new_id: returns a request id.
            announced: takes what a member says of its trees of files.
        """
        self._members = members
        self._chains = chains
        self._calls = calls
        self._document = document
        self._offer_document = offer_document
        self._new_id = new_id
        self._announced = announced
        self._splits = splits
        self._allowances: dict[int, Allowance] = {}

    def _allowance(self, cid: int) -> Allowance:
        return self._allowances.setdefault(cid, Allowance(time.monotonic, ANNOUNCED_BYTES_S, ANNOUNCED_BYTES_S))

    # -- events -------------------------------------------------------------------------------------------------------

    def event(self, link: MemberLink, parts: Sequence[zmq.Frame]) -> None:
        """Take an event that a member has published."""
        try:
            match [part.bytes for part in parts]:
                case [b"f", header, body]:
                    self._chains.live(link.member.cid, self._frame(link, header, body))
                case [b"h", data]:
                    self._heartbeat(link, Heartbeat.unpack(data))
                case [b"d", data]:
                    self._offer_document(link.member.cid, data)
                case [b"t", data]:
                    if len(data) > MAX_ANNOUNCEMENT:
                        raise ProtocolError(f"an announcement has {len(data)} bytes, {MAX_ANNOUNCEMENT} are allowed")
                    if self._allowance(link.member.cid).takes(len(data)):
                        self._announced(link.member.cid, data)
                case _:
                    raise ProtocolError(f"an event of {len(parts)} parts is not known here")
        except PmgsyncError as error:
            self._members.refuse(link.member.cid, error)

    def _replayed(self, link: MemberLink, request: int, parts: Sequence[bytes]) -> None:
        try:
            self._chains.replayed(request, read_frames(parts))
        except FrameDamagedError:
            self._chains.damaged_frame(link.member.cid)
            raise

    def _frame(self, link: MemberLink, header: bytes, body: bytes) -> Frame:
        try:
            return read_frame(header, body)
        except FrameDamagedError:
            self._chains.damaged_frame(link.member.cid)
            raise

    def _heartbeat(self, link: MemberLink, heartbeat: Heartbeat) -> None:
        document = self._document()
        if heartbeat.cid != link.member.cid or heartbeat.cluster != document.cluster:
            raise ProtocolError("its heartbeat speaks for another node or cluster")
        self._members.heard(link, heartbeat)
        self._splits.heard(heartbeat.cid, heartbeat.epoch, heartbeat.master)
        version = heartbeat.epoch, heartbeat.serial
        # An epoch that this node's history does not have, one of the two by force: which document counts does not show
        # in its number, and it may be neither.
        other = heartbeat.master != 0 and not is_known(document, heartbeat.epoch, heartbeat.master)
        if version > document.version or other:
            link.send({"op": "document", "id": self._new_id()})
        self._chains.heard(heartbeat)

    # -- answers ------------------------------------------------------------------------------------------------------

    def answer(self, link: MemberLink, parts: Sequence[zmq.Frame]) -> None:
        """Take a message on the control connection to a member."""
        try:
            self._answer(link, unpack(parts[0].bytes), parts[1:], len(parts[0]))
        except PmgsyncError as error:
            self._members.refuse(link.member.cid, error)

    def _answer(self, link: MemberLink, message: Message, frames: Sequence[zmq.Frame], size: int) -> None:
        check_id(message)
        request, owner = message.get("id", 0), peer(link.member.cid)
        if message["op"] == "data":
            # The bulk of what comes here: passed on as it is.
            self._calls.from_server(owner, message, frames, size)
            return
        parts = [frame.bytes for frame in frames]
        match message["op"]:
            case "frame":
                self._replayed(link, request, parts)
            case "pong":
                pass
            case "end":
                self._chains.replay_ended(request)
            case "document":
                if len(parts) == 1:
                    self._offer_document(link.member.cid, parts[0])
            case "done":
                self._calls.from_server(owner, message, parts)
            case "error":
                if not self._calls.from_server(owner, message, parts):
                    self._chains.replay_failed(request, error_from(message))
            case "cancel":
                error = UnreachableError(f"node {link.member.cid} broke the replay off")
                self._chains.replay_failed(request, error)
            case other:
                raise UnknownOperationError(f"the operation {other!r:.40} is not known here")

    def connected(self, link: MemberLink) -> None:
        """Ask at once for what is missing."""
        self._chains.connected()

    def connection_lost(self, link: MemberLink) -> None:
        """End what was asked of a member and will not be answered any more."""
        self._chains.connection_lost(link.member.cid)
        reason = UnreachableError(f"the connection to {link.member.name} ({link.member.cid}) was lost")
        self._calls.drop_owner(peer(link.member.cid), reason)
