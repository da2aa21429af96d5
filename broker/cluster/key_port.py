"""The key port: tells this node's CURVE public key to anybody, and nothing else.

Its own key pair is known to everybody, so that a newcomer that has no fingerprint yet need not speak in clear text.
That proves nothing: the person who joins compares the fingerprint before anything else is said.
"""

from __future__ import annotations

import hashlib

import zmq
from zmq.utils import z85

from broker.net.keys import NodeKeys
from broker.net.port import Port
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownOperationError
from pmgsync.wire.messages import error_map, pack, unpack

KNOWN_SECRET = hashlib.sha256(b"pmgsync key port, known to everybody").digest()
KNOWN_PUBLIC = z85.decode(zmq.curve_public(z85.encode(KNOWN_SECRET)))


class KeyPort:
    """Answers `key`."""

    def __init__(self, port: Port, keys: NodeKeys) -> None:
        self._port = port
        self._keys = keys

    def receive(self, parts: list[zmq.Frame]) -> None:
        """Take a message with the sender's identity in front."""
        request = 0
        try:
            if len(parts) != 2:
                raise ProtocolError("a request for a key is one map")
            message = unpack(parts[1].bytes)
            request = message["id"] if type(message.get("id")) is int else 0
            if message["op"] != "key":
                raise UnknownOperationError(f"the key port does not know {message['op']!r:.40}")
            answer = {"op": "key", "id": request, "curve_key": self._keys.curve_public}
        except PmgsyncError as error:
            answer = error_map(request, error)
        self._port.send([parts[0].bytes, pack(answer)])
