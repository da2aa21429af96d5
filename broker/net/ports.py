"""The TCP ports of a node: what is bound there, when it is bound, and when it is closed to cut connections."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import zmq

from broker.cluster.door import Door
from broker.desks.members import MemberDesk
from broker.net import sockets
from broker.net.loop import Socket

if TYPE_CHECKING:
    from broker.node import Broker

PATIENCE_S = 2.0
"""A port that was just closed here may be taken for an instant longer: libzmq closes it in a thread of its own."""


class Ports:
    """Events, control and door of one node."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._closed_at = -PATIENCE_S
        self._publisher: Socket | None = None
        self._members: MemberDesk | None = None
        self._door: Door | None = None

    def publish(self, *parts: bytes) -> None:
        """Publish an event; nothing happens while there is no members' socket."""
        if self._publisher is not None:
            self._publisher.send_multipart(parts)

    def bind(self, *, master: bool) -> None:
        """Bind every port that is wanted and not bound; one that was closed here just now is left to the next call.

        Args:
            master: newcomers are let in here.

        Raises:
            ConfigError: when a port cannot be bound.
        """
        try:
            self._open_members_sockets()
            self._tend_door(wanted=master)
        except sockets.PortInUseError:
            if time.monotonic() - self._closed_at >= PATIENCE_S:
                raise

    def cut(self) -> None:
        """Close what members are connected to: libzmq looks at keys at the handshake only, so a removed member's live
        connections end with the sockets."""
        if self._publisher is not None:
            self._closed_at = time.monotonic()
            self._publisher.close(linger=200)
            self._publisher = None
        if self._members is not None:
            self._members.close()
            self._members = None

    def close(self) -> None:
        """Close every port."""
        self.cut()
        self._tend_door(wanted=False)

    def lose_patience(self) -> None:
        """A port that is taken at the next `bind` is an error."""
        self._closed_at = -PATIENCE_S

    def _open_members_sockets(self) -> None:
        config, keys, context = self._broker.config, self._broker.keys, self._broker.context
        if self._publisher is None:
            publisher = sockets.open_socket(context, zmq.PUB)
            sockets.serve(publisher, keys, sockets.MEMBERS_DOMAIN, config.address, config.events_port, "events")
            self._publisher = publisher
        if self._members is None:
            router = sockets.open_socket(context, zmq.ROUTER, max_bytes=sockets.CONTROL_MAX_BYTES, hwm=10_000)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            sockets.serve(router, keys, sockets.MEMBERS_DOMAIN, config.address, config.control_port, "control")
            self._members = MemberDesk(self._broker, router)

    def _tend_door(self, *, wanted: bool) -> None:
        if wanted and self._door is None:
            broker = self._broker
            self._door = Door(
                broker.context, broker.loop, broker.keys, broker.tokens, broker,
                address=broker.config.address, port=broker.config.join_port,
            )  # fmt: skip
        elif not wanted and self._door is not None:
            self._door.close()
            self._door = None
