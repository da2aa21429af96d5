"""A peer link: the two connections to one member (SUB for events, DEALER for control), rebuilt on silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.cluster.state_directory import NodeKeys
from broker.net import sockets
from broker.net.loop import Loop, Socket
from broker.status.heartbeats import DOWN_AFTER_S, Heartbeat
from broker.status.skew import ClockSkew
from pmgsync.core.frames import MAX_BODY
from pmgsync.core.membership import Member
from pmgsync.wire.messages import pack

log = logging.getLogger(__name__)

REBUILD_AFTER_S = 5.0
"""Silence after which a socket is made anew: a peer that vanished without FIN looks alive, and libzmq gives a socket up
for good that ZAP has denied, or that received something damaged."""
PING_S = 1.0
"""A control connection that carries nothing is asked for a sign of life so often."""
REFUSED_S = 60.0
"""For so long it is shown that something a member sent was refused."""

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)


_FAILED = frozenset(
    {
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
        zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    }
)


class _Connection:
    """One connecting socket with its monitor: libzmq itself does not tell why nothing comes.

    Attributes:
        problem: why there is no connection, "" while there is one.
        established: True from the handshake to the end of the connection.
        changed: when `established` last changed, or the socket was made.
        lasted_s: for how long the newest connection that has ended was established.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        keys: NodeKeys,
        member: Member,
        kind: int,
        port: int,
        *,
        receive: Callable[[list[zmq.Frame]], None],
        ended: Callable[[], None],
    ) -> None:
        self.problem = ""
        self.established = False
        self.changed = time.monotonic()
        self.lasted_s = 0.0
        self._explained = False
        self._member = member
        self._where = f"{member.name} ({member.cid}) at {member.address}:{port}"
        self._loop = loop
        self._ended = ended
        self.socket = sockets.open_socket(
            context, kind, max_bytes=MAX_BODY, hwm=sockets.EVENTS_HWM if kind == zmq.SUB else sockets.CONTROL_HWM
        )
        if kind == zmq.SUB:
            self.socket.subscribe(b"")
        self._monitor = self.socket.get_monitor_socket(_EVENTS)
        loop.add_socket(self._monitor, self._watch)
        loop.add_socket(self.socket, receive)
        try:
            sockets.connect(self.socket, keys, member.curve_key, member.address, port)
        except zmq.ZMQError as error:
            # A member's address comes from the member: one that libzmq will not have must stop nobody's broker.
            self._note(f"{self._where} is not an address to connect to ({error.strerror})")

    def close(self) -> None:
        """Close it without a word."""
        for socket in (self._monitor, self.socket):
            self._loop.remove(socket)
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)

    def _watch(self, parts: list[zmq.Frame]) -> None:
        event = parse_monitor_message([part.bytes for part in parts])["event"]
        greeted = self.established
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                problem = ""
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                problem = f"{self._where} refuses this node's key"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if not greeted:
                problem = f"the handshake with {self._where} failed: its key may not be the one in the cluster document"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                problem = f"what came from {self._where} was damaged on the way"
            case zmq.EVENT_CONNECTED:
                self._explained = False
                return
            case zmq.EVENT_DISCONNECTED if self._explained:
                problem = self.problem
            case zmq.EVENT_DISCONNECTED if greeted:
                problem = f"{self._where} closed the connection"
            case zmq.EVENT_DISCONNECTED:
                problem = f"{self._where} closed the connection before the handshake: its key may have changed"
            case zmq.EVENT_CONNECT_RETRIED:
                problem = self.problem or f"{self._where} does not accept connections"
            case _:
                return
        # The end of the connection that follows tells less than the reason that came before it.
        self._explained = event in _FAILED
        self.established = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self.established != greeted:
            now = time.monotonic()
            self.lasted_s, self.changed = now - self.changed if greeted else self.lasted_s, now
        self._note(problem)
        if greeted and not self.established:
            self._ended()

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("action=link-problem cid=%d problem=%s", self._member.cid, problem)
        self.problem = problem


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
        """`on_rebuilt` is called when what was asked of the member will not be answered any more."""
        self.member = member
        self.heartbeat: Heartbeat | None = None
        self.reconnects = 0
        self._context = context
        self._loop = loop
        self._keys = keys
        self._on_event = on_event
        self._on_control = on_control
        self._on_rebuilt = on_rebuilt
        self._heard = time.monotonic()
        self._asked: float | None = None
        self._answered = 0.0
        self._refused, self._refused_at = "", 0.0
        self._skew = ClockSkew()
        self._events = self._open_events()
        self._control = self._open_control()

    @property
    def problem(self) -> str:
        """Why the member is not heard, "" when that is not known."""
        return self._events.problem or self.refused

    @property
    def control_problem(self) -> str:
        """Why nothing can be asked of the member, "" while it can."""
        return self._control.problem

    @property
    def refused(self) -> str:
        """Why something that the member sent in the last minute was refused, "" when nothing was."""
        return self._refused if time.monotonic() - self._refused_at < REFUSED_S else ""

    @property
    def age_s(self) -> float:
        """Seconds since the newest heartbeat, infinite before the first."""
        return time.monotonic() - self.heartbeat.received if self.heartbeat else float("inf")

    @property
    def up(self) -> bool:
        """True while heartbeats come."""
        return self.age_s < DOWN_AFTER_S

    @property
    def clock_skew_s(self) -> float | None:
        """How far the member's clock seems to be ahead of this node's; None while it is not heard."""
        return self._skew.seconds if self.up else None

    def heard(self, heartbeat: Heartbeat) -> None:
        """Note a heartbeat."""
        self.heartbeat = heartbeat
        self._skew.note(heartbeat.time_us, time.time_ns() // 1000)

    def refuse(self, reason: str) -> None:
        """Note that something the member sent was refused."""
        self._refused, self._refused_at = reason, time.monotonic()

    def send(self, message: Mapping[str, Any], attachments: Sequence[bytes] = ()) -> bool:
        """Send a control message; False when the member is not connected."""
        if not self._control.established:
            return False
        try:
            self._control.socket.send_multipart([pack(message), *attachments], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def tick(self) -> None:
        """Make the sockets anew when nothing was heard for long, or the control connection does not come back."""
        now = time.monotonic()
        if now - self._heard > REBUILD_AFTER_S:
            self.rebuild()
        elif not self._control_lives(now):
            # The events connection is well and must not lose anything because the control port is shut.
            self._renew_control()

    def _control_ended(self) -> None:
        if self._control.lasted_s > PING_S:
            self._renew_control()
        else:
            # Left to libzmq, which takes more and more time: this may go on.
            self._on_rebuilt(self)

    def _renew_control(self) -> None:
        """Make the control connection anew: what is queued in the old socket must not reach the member any more."""
        self._control.close()
        self._control = self._open_control()
        self._on_rebuilt(self)

    def _control_lives(self, now: float) -> bool:
        """Return False when the control connection has been gone, or has not answered, for too long."""
        if not self._control.established:
            return now - self._control.changed <= REBUILD_AFTER_S
        if self._asked is None and now - self._answered >= PING_S and self.send({"op": "ping", "id": 0}):
            self._asked = now
        return self._asked is None or now - self._asked <= REBUILD_AFTER_S

    def rebuild(self) -> None:
        """Close both connections and make new ones."""
        self.close()
        self.reconnects += 1
        self._heard = time.monotonic()
        self._events = self._open_events()
        self._control = self._open_control()
        self._on_rebuilt(self)

    def close(self) -> None:
        """Close both connections."""
        self._events.close()
        self._control.close()

    def _open_events(self) -> _Connection:
        def receive(parts: list[zmq.Frame]) -> None:
            self._heard = time.monotonic()
            self._on_event(self, parts)

        return self._open(zmq.SUB, self.member.events, receive, lambda: None)

    def _open_control(self) -> _Connection:
        self._asked, self._answered = None, time.monotonic()

        def receive(parts: list[zmq.Frame]) -> None:
            self._asked, self._answered = None, time.monotonic()
            self._on_control(self, parts)

        return self._open(zmq.DEALER, self.member.control, receive, self._control_ended)

    def _open(
        self, kind: int, port: int, receive: Callable[[list[zmq.Frame]], None], ended: Callable[[], None]
    ) -> _Connection:
        return _Connection(self._context, self._loop, self._keys, self.member, kind, port, receive=receive, ended=ended)
