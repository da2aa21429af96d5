"""A peer on another node, over a ZeroMQ DEALER."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from pmgsync.errors import UnreachableError
from pmgsync.wire.parts import has_message, receive_parts, send_parts
from pmgsync.wire.peer import Peer


class DealerPeer(Peer):
    """Requests and calls over a DEALER that is connected, and closed by whoever made it."""

    def __init__(self, socket: zmq.Socket[bytes], name: str) -> None:
        super().__init__(name)
        self._socket = socket

    def put(self, parts: Sequence[bytes]) -> None:
        try:
            send_parts(self._socket, parts)
        except zmq.Again:
            raise UnreachableError(f"{self.name} takes no messages") from None

    def get(self, timeout_s: float) -> Sequence[bytes] | None:
        if not has_message(self._socket) and not self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return [part.bytes for part in receive_parts(self._socket)]
