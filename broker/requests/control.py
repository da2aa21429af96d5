"""Requests of other members, on the control port. Who asks is known from the CURVE key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from broker.cluster.joiners import Joiners
from broker.heartbeats.heartbeat import parse_applied
from broker.members.calls import Send
from broker.members.members import Members
from broker.net.port import Port
from broker.requests.keys import KeyRequests
from broker.requests.shared import SharedRequests, answer_error, number
from broker.requests.voting import VotingRequests
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownOperationError
from pmgsync.wire.messages import Message, pack, unpack


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
        confirm: Callable[[int], None],
        give_up: Callable[[int], None],
    ) -> None:
        """Begin.

        Args:
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

    def receive(self, parts: list[zmq.Frame]) -> None:
        """Take a message with the sender's identity in front."""
        identity, cid = parts[0].bytes, int(str(parts[-1].get("User-Id")))
        owner = ("member", cid, identity)
        self._joiners.heard(cid)

        def send(message: Mapping[str, Any], attachments: Sequence[bytes]) -> bool:
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

    def _handle(self, owner: object, cid: int, send: Send, message: Message, attachments: Sequence[bytes]) -> None:
        if self._shared.handle(owner, send, message) or self._voting.handle(cid, send, message, attachments):
            return
        if self._keys.handle(cid, send, message):
            return
        match message["op"]:
            case "ack":
                try:
                    applied = parse_applied(message.get("applied"), message.get("visible"))
                except (TypeError, ValueError, AttributeError) as error:
                    raise ProtocolError(f"an ack is malformed ({error})") from error
                self._members.acknowledge(cid, applied)
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
