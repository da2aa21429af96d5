"""The ports of a node that is in a cluster, and who serves each."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from broker.cluster.door import Door
from broker.cluster.key_port import KNOWN_SECRET, KeyPort
from broker.net.keys import NodeKeys
from broker.net.loop import Loop
from broker.net.port import Ports
from broker.requests.control import ControlRequests

SUBSCRIBED = b"\x01"
"""What a subscription begins with."""
SUBSCRIBED_BEAT_S = 0.01
"""Seconds after which a heartbeat follows a subscription; one for all that subscribe meanwhile. Without it the first
frames came up to a second after a connection was there again."""
CUT_LINGER_MS = 200
"""So long the document that removes a member may still be sent to it: it should not learn that by silence."""


class ServedPorts:
    """Binds the ports, and closes them."""

    def __init__(
        self,
        ports: Ports,
        loop: Loop,
        keys: NodeKeys,
        *,
        control: ControlRequests,
        door: Door,
        beat: Callable[[], None],
    ) -> None:
        """Begin with what is bound; `beat` publishes a heartbeat."""
        self._ports = ports
        self._loop = loop
        self._keys = keys
        self._control = control
        self._door = door
        self._key_port = KeyPort(ports.key, keys)
        self._beat = beat
        self._beats_soon = self._is_closed = False

    def open(self, *, is_master: bool) -> None:
        """Bind what is not bound; the join port and the key port on the master only.

        Raises:
            ConfigError: when a port cannot be bound.
        """
        secret = self._keys.curve_secret
        self._ports.events.open(secret, self._subscribed)
        self._ports.control.open(secret, self._control.receive)
        if is_master:
            self._ports.join.open(secret, self._door.receive)
            self._ports.key.try_open(KNOWN_SECRET, self._key_port.receive)
        else:
            self._close_strangers()

    def cut(self, *, renewed: bool) -> None:
        """End all connections of members; of strangers too, when this node has other keys now (`renewed`)."""
        self._ports.events.close(linger_ms=CUT_LINGER_MS)
        self._ports.control.close(linger_ms=CUT_LINGER_MS)
        if renewed:
            self._ports.join.close()

    def close(self) -> None:
        """Close all ports."""
        self._is_closed = True
        self.cut(renewed=False)
        self._close_strangers()

    def _close_strangers(self) -> None:
        self._ports.join.close()
        self._ports.key.close()

    def _subscribed(self, parts: list[zmq.Frame]) -> None:
        """Tell whoever has begun to listen where the chains are: it may have missed their ends."""
        if parts[0].bytes[:1] == SUBSCRIBED and not self._beats_soon:
            self._beats_soon = True
            self._loop.once(SUBSCRIBED_BEAT_S, self._beat_soon)

    def _beat_soon(self) -> None:
        self._beats_soon = False
        if not self._is_closed:
            self._beat()
