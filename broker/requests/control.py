"""Requests of other members, on the control port. Who asks is known from the CURVE key."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from broker.cluster.joiners import Joiners
from broker.heartbeats.heartbeat import parse_applied
from broker.members.calls import Attachments, Send
from broker.members.members import Members
from broker.net.port import Port
from broker.net.zap import REMOVED
from broker.requests.keys import KeyRequests
from broker.requests.shared import SharedRequests, answer_error, number
from broker.requests.voting import VotingRequests
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownOperationError
from pmgsync.wire.messages import Message, pack, unpack

TELL_REMOVED_S = 0.2
"""Nodes that were removed are told so no faster than this, all together."""


class ControlRequests:
    """Answers on the control ROUTER."""

    def __init__(
        self,
        cid: int,
        port: Port,
        shared: SharedRequests,
        members: Members,
        joiners: Joiners,
        voting: VotingRequests,
        keys: KeyRequests,
        *,
        document: Callable[[], bytes],
        confirm: Callable[[int], None],
        give_up: Callable[[int], None],
    ) -> None:
        """Begin.

        Args:
            document: returns the signed document in force, as it travels.
            confirm: makes a joining node a full member, on the master; raises PmgsyncError elsewhere.
            give_up: removes a node that is joining, on the master; raises PmgsyncError elsewhere.
        """
        self._cid = cid
        self._port = port
        self._shared = shared
        self._members = members
        self._joiners = joiners
        self._voting = voting
        self._keys = keys
        self._confirm = confirm
        self._give_up = give_up
        self._document = document
        self._tell_removed_at = 0.0

    def receive(self, parts: list[zmq.Frame]) -> None:
        """Take a message with the sender's identity in front."""
        identity, who = parts[0].bytes, str(parts[-1].get("User-Id"))
        if who == REMOVED:
            self._tell_removed(identity)
            return
        cid = int(who)
        owner = ("member", cid, identity)
        self._joiners.heard(cid)

        def send(message: Mapping[str, Any], attachments: Attachments) -> bool:
            if self._port.send([identity, pack(message), *attachments]):
                return True
            self._shared.close_streams(owner)
            return False

        message: Message | None = None
        try:
            if len(parts) < 2:
                raise ProtocolError("a control message is empty")
            message = unpack(parts[1].bytes)
            attachments = [part.bytes for part in parts[2:]]
            self._handle(owner, cid, send, message, attachments)
        except PmgsyncError as error:
            self._members.refuse(cid, error)
            answer_error(send, message, error)

    def _tell_removed(self, identity: bytes) -> None:
        """Send a node that was removed the document that says so, whatever it has asked; now and then at most."""
        now = time.monotonic()
        if now >= self._tell_removed_at:
            self._tell_removed_at = now + TELL_REMOVED_S
            self._port.send([identity, pack({"op": "document", "id": 0}), self._document()])

    def _handle(self, owner: object, cid: int, send: Send, message: Message, attachments: Sequence[bytes]) -> None:
        if self._shared.handle(owner, send, message) or self._voting.handle(cid, send, message, attachments):
            return
        if self._keys.handle(cid, send, message):
            return
        match message["op"]:
            case "ack":
                try:
                    applied = parse_applied(message.get("applied"), message.get("visible"), message.get("partial"))
                except (TypeError, ValueError, AttributeError) as error:
                    raise ProtocolError(f"an ack is malformed ({error})") from error
                epoch, master = (number(message, key) if key in message else 0 for key in ("epoch", "master"))
                self._members.acknowledge(cid, applied, epoch, master)
            case "call":
                self._shared.call(owner, send, message, target=self._cid, caller=cid)
            case "join.progress":
                self._joiners.tell(cid, message)
            case "join.abandoned":
                self._give_up(cid)
            case "join.done":
                self._confirm(cid)
                send({"op": "done", "id": number(message, "id"), "result": {}}, ())
            case other:
                raise UnknownOperationError(f"the operation {other!r:.40} is not known here")
