"""The ZAP handler: libzmq asks it which CURVE keys may connect, and under which name."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from broker.net.handshakes import NO_MEMBER, NOT_A_MEMBER
from broker.net.incoming import plain_address
from broker.net.loop import Loop, Socket
from broker.net.refusals import Refusals
from pmgsync.wire.parts import send_parts

ANYBODYS = frozenset({b"join", b"key"})
"""The domains that any key passes. A domain is what its port is for, as in the section [ports] of node.toml."""
MEMBERS = frozenset({b"events", b"control"})
CONTROL = b"control"
"""Here removed nodes are let through, too, under the name `REMOVED`, to be told what they are."""
REMOVED = "removed"


class ZapHandler:
    """Lets members through under their CID, and everybody through to the join door and the key port under his key."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        cid_of: Callable[[bytes], int],
        refusals: Refusals,
        was_removed: Callable[[bytes], bool] = lambda key: False,
    ) -> None:
        """Begin.

        Args:
            cid_of: returns the CID of the member with a CURVE public key, 0 for a stranger.
            refusals: is told of those who are not let through.
            was_removed: says whether a key is that of a node that was a member.
        """
        self._cid_of = cid_of
        self._was_removed = was_removed
        self._loop = loop
        self._refusals = refusals
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind("inproc://zeromq.zap.01")
        loop.add_socket(self._socket, self._answer)

    def _answer(self, parts: list[zmq.Frame]) -> None:
        request = [part.bytes for part in parts]
        status, text, user = str(NOT_A_MEMBER).encode(), b"not a member", b""
        if len(request) == 7 and request[0] == b"1.0" and request[5] == b"CURVE":
            domain, address, key = request[2], request[3].decode(errors="replace"), request[6]
            if domain in ANYBODYS:
                status, text, user = b"200", b"OK", key.hex().encode()
            elif domain in MEMBERS and (cid := self._cid_of(key)):
                status, text, user = b"200", b"OK", str(cid).encode()
            elif domain == CONTROL and self._was_removed(key):
                status, text, user = b"200", b"OK", REMOVED.encode()
            else:
                self._refusals.note(domain.decode(errors="replace"), plain_address(address), NO_MEMBER)
        request_id = request[1] if len(request) > 1 else b""
        send_parts(self._socket, [b"1.0", request_id, status, text, user, b""], wait=True)

    def close(self) -> None:
        """Stop answering; handshakes fail from now on."""
        self._loop.remove(self._socket)
        self._socket.close()
