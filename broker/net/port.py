"""A TCP port of this node: bound when it is wanted, closed to cut the connections that it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from broker.net import sockets
from broker.net.incoming import Incoming
from broker.net.loop import Loop, Socket
from broker.net.refusals import Refusals
from broker.net.zap import MEMBERS
from pmgsync.errors import ConfigError
from pmgsync.wire.parts import send_parts

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""A port that was just closed here may be taken for an instant longer: libzmq closes it in a thread of its own."""

Receive = Callable[[list[zmq.Frame]], None]


class Port:
    """One CURVE server socket and the loop that it is read in; `open` may be called again and again."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        kind: int,
        address: str,
        number: int,
        purpose: str,
        refusals: Refusals,
        *,
        max_bytes: int = sockets.JOIN_MAX_BYTES,
        hwm: int = sockets.EVENTS_HWM,
    ) -> None:
        self._context = context
        self._loop = loop
        self._kind = kind
        self._address = address
        self._number = number
        self._purpose = purpose
        self._refusals = refusals
        self._max_bytes = max_bytes
        self._hwm = hwm
        self._socket: Socket | None = None
        self._incoming: Incoming | None = None
        self._closed_at = -PATIENCE_S
        self._problem = ""

    def open(self, secret_key: bytes, receive: Receive) -> None:
        """Bind the port unless it is bound; one that was closed here just now is left to the next call.

        Args:
            secret_key: the CURVE secret that this port serves with.
            receive: called with every message that arrives, on a port for events with every subscription.

        Raises:
            ConfigError: when it cannot be bound.
        """
        if self._socket is not None:
            return
        socket = sockets.open_socket(
            self._context,
            self._kind,
            max_bytes=self._max_bytes,
            hwm=self._hwm,
            rcvhwm=min(self._hwm, sockets.TAKEN_HWM),
        )
        if self._kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        elif self._kind == zmq.XPUB:
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # tells of every subscriber, not only of the first
        incoming = Incoming(self._context, self._loop, socket, self._number, self._purpose, self._refusals)
        try:
            sockets.serve(socket, secret_key, self._address, self._number, self._purpose)
        except ConfigError as error:
            incoming.close()
            socket.close(linger=0)
            if isinstance(error, sockets.PortInUseError) and time.monotonic() - self._closed_at < PATIENCE_S:
                return
            raise

        def heard(parts: list[zmq.Frame]) -> None:
            incoming.heard(parts)
            receive(parts)

        self._loop.add_socket(socket, heard if self._purpose.encode() in MEMBERS else receive)
        self._socket, self._incoming = socket, incoming

    def try_open(self, secret_key: bytes, receive: Receive) -> None:
        """Bind a port that the node can do without, unless it is bound; why it cannot be is logged once."""
        try:
            self.open(secret_key, receive)
            self._problem = ""
        except ConfigError as error:
            if error.message != self._problem:
                self._problem = error.message
                log.warning("action=port-not-bound error=%s", error)

    def close(self, *, linger_ms: int = 0) -> None:
        """Unbind. libzmq looks at keys at the handshake only: a removed member's live connections end with the socket.

        Args:
            linger_ms: for so long what is queued may still be sent.
        """
        if self._socket is not None:
            self._closed_at = time.monotonic()
            self._loop.remove(self._socket)
            if self._incoming is not None:
                self._incoming.close()
            self._socket.close(linger=linger_ms)
            self._socket = self._incoming = None

    def fail_when_taken(self) -> None:
        """Make a port that is taken an error at the next `open`."""
        self._closed_at = -PATIENCE_S

    def publish(self, parts: Sequence[bytes]) -> None:
        """Send to whoever has subscribed; nothing happens while the port is closed."""
        if self._socket is not None:
            send_parts(self._socket, parts, wait=True)

    def send(self, parts: Sequence[bytes | zmq.Frame]) -> bool:
        """Send to one peer, by its identity in the first part; False when it is gone or takes no more.

        What has attachments is refused first: answers must get through to whoever waits for something large.
        """
        if self._socket is None or self._incoming is None:
            return False
        to, size = parts[0], sum(map(len, parts))
        if len(parts) > 2 and isinstance(to, bytes) and not self._incoming.takes(to, len(parts), size):
            return False
        try:
            send_parts(self._socket, parts)
        except zmq.ZMQError:
            return False
        return True


@dataclass(frozen=True)
class Ports:
    """The TCP ports of a node. They outlive its part in a cluster: one just closed may be in use a while longer."""

    events: Port
    control: Port
    join: Port
    key: Port
