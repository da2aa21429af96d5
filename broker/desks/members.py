"""The members' desk: requests of other members on the control ROUTER. Who asks is known from the CURVE key."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from broker.desks.requests import answer_error, begin_call, common
from broker.net.loop import Socket
from broker.status.heartbeats import parse_applied
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownOperationError
from pmgsync.wire.messages import Message, pack, unpack

if TYPE_CHECKING:
    from broker.node import Broker

log = logging.getLogger(__name__)


class MemberDesk:
    """Serves the control ROUTER."""

    def __init__(self, broker: Broker, socket: Socket) -> None:
        self._broker = broker
        self._socket = socket
        broker.loop.add_socket(socket, self._receive)

    def close(self) -> None:
        """Unbind."""
        self._broker.loop.remove(self._socket)
        self._socket.close(linger=200)

    def _receive(self, parts: list[zmq.Frame]) -> None:
        identity, cid = parts[0].bytes, int(str(parts[-1].get("User-Id")))
        owner = ("member", cid, identity)

        def send(message: Mapping[str, Any], attachments: Sequence[bytes]) -> bool:
            try:
                self._socket.send_multipart([identity, pack(message), *attachments], zmq.NOBLOCK)
            except zmq.ZMQError:
                # Gone, or it does not read what it asked for.
                if self._broker.streams is not None:
                    self._broker.streams.close_owner(owner)
                return False
            return True

        message: Message | None = None
        try:
            if len(parts) < 2:
                raise ProtocolError("a control message is empty")
            message = unpack(parts[1].bytes)
            self._handle(owner, cid, send, message, [part.bytes for part in parts[2:]])
        except PmgsyncError as error:
            self._broker.note(cid, error)
            answer_error(send, message, error)

    def _handle(self, owner: object, cid: int, send: Any, message: Message, attachments: Sequence[bytes]) -> None:
        if common(self._broker, owner, send, message, attachments):
            return
        match message["op"]:
            case "ack":
                try:
                    applied = parse_applied(message.get("applied"))
                except (TypeError, ValueError, AttributeError) as error:
                    raise ProtocolError(f"an ack is malformed ({error})") from error
                self._broker.acked.setdefault(cid, {}).update(applied)
            case "call":
                begin_call(self._broker, owner, send, message, self._broker.cid, cid)
            case other:
                raise UnknownOperationError(f"the operation {other!r:.40} is not known here")
