"""A peer link: the two connections to one member (SUB for events, DEALER for control), rebuilt on silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker import sockets
from broker.heartbeats import DOWN_AFTER_S, Heartbeat
from broker.loop import Loop, Socket
from broker.state import NodeKeys
from pmgsync.frames import MAX_BODY
from pmgsync.link import pack
from pmgsync.membership import Member

log = logging.getLogger(__name__)

REBUILD_AFTER_S = 5.0
"""Silence after which the sockets are made anew: a peer that vanished without FIN looks alive, and a socket that ZAP
has denied once never asks again."""

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)


class PeerLink:
    """The connections to one member, and the newest that was heard from it."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        keys: NodeKeys,
        member: Member,
        *,
        on_event: Callable[[PeerLink, Sequence[zmq.Frame]], None],
        on_control: Callable[[PeerLink, Sequence[zmq.Frame]], None],
        on_rebuilt: Callable[[PeerLink], None],
    ) -> None:
        self.member = member
        self.heartbeat: Heartbeat | None = None
        self.problem = ""
        self.reconnects = 0
        self._context = context
        self._loop = loop
        self._keys = keys
        self._on_event = on_event
        self._on_control = on_control
        self._on_rebuilt = on_rebuilt
        self._heard = time.monotonic()
        self._greeted = False
        self._open()

    @property
    def age_s(self) -> float:
        """Seconds since the newest heartbeat, infinite before the first."""
        return time.monotonic() - self.heartbeat.received if self.heartbeat else float("inf")

    @property
    def up(self) -> bool:
        """True while heartbeats come."""
        return self.age_s < DOWN_AFTER_S

    def heard(self, heartbeat: Heartbeat) -> None:
        """Note a heartbeat."""
        self.heartbeat = heartbeat
        self._heard = heartbeat.received
        self.problem = ""

    def send(self, message: Mapping[str, Any], attachments: Sequence[bytes] = ()) -> bool:
        """Send a control message; False when the member is not connected."""
        try:
            self._control.send_multipart([pack(message), *attachments], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def tick(self) -> None:
        """Make the sockets anew when nothing was heard for long."""
        if time.monotonic() - self._heard > REBUILD_AFTER_S:
            self.rebuild()

    def rebuild(self) -> None:
        """Close both connections and make new ones."""
        self.close()
        self.reconnects += 1
        self._heard = time.monotonic()
        self._open()
        self._on_rebuilt(self)

    def close(self) -> None:
        """Close both connections."""
        for socket in (self._monitor, self._events, self._control):
            self._loop.remove(socket)
        self._events.disable_monitor()
        self._monitor.close(linger=0)
        self._events.close(linger=0)
        self._control.close(linger=0)

    def _open(self) -> None:
        member = self.member
        self._greeted = False
        self._events = sockets.open_socket(self._context, zmq.SUB, max_bytes=MAX_BODY)
        self._events.subscribe(b"")
        self._monitor = self._events.get_monitor_socket(_EVENTS)
        self._control = sockets.open_socket(self._context, zmq.DEALER, max_bytes=MAX_BODY, hwm=10_000)
        self._loop.add_socket(self._monitor, self._watch)
        self._loop.add_socket(self._events, lambda parts: self._on_event(self, parts))
        self._loop.add_socket(self._control, lambda parts: self._on_control(self, parts))
        sockets.connect(self._events, self._keys, member.curve_key, member.address, member.events)
        sockets.connect(self._control, self._keys, member.curve_key, member.address, member.control)

    def _watch(self, parts: list[zmq.Frame]) -> None:
        event = parse_monitor_message([part.bytes for part in parts])["event"]
        where = f"{self.member.name} ({self.member.cid}) at {self.member.address}:{self.member.events}"
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greeted = True
                problem = ""
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                problem = f"{where} refuses this node's key"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                problem = f"the handshake with {where} failed: its key is not the one in the cluster document"
            case zmq.EVENT_DISCONNECTED:
                problem = (
                    f"{where} closed the connection"
                    if self._greeted
                    else f"{where} closed the connection before the handshake: its key may have changed"
                )
                self._greeted = False
            case zmq.EVENT_CONNECT_RETRIED:
                problem = self.problem or f"{where} does not accept connections"
            case _:
                return
        if problem and problem != self.problem:
            log.warning("action=link-problem cid=%d problem=%s", self.member.cid, problem)
        self.problem = problem
