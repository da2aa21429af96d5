"""The link to one member: a SUB for events and a DEALER for control, replaced by new ones when they are silent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import zmq

from broker.heartbeats.heartbeat import DOWN_AFTER_S, Heartbeat, HeldChain
from broker.heartbeats.skew import ClockSkew
from broker.members.calls import Attachments
from broker.members.connection import Connection
from broker.net.keys import NodeKeys
from broker.net.loop import Loop, Socket
from pmgsync.core.membership import Member
from pmgsync.wire.messages import pack
from pmgsync.wire.parts import send_parts

log = logging.getLogger(__name__)

REBUILD_AFTER_S = 5.0
"""Silence after which a socket is replaced. A peer that vanished without FIN looks alive; and libzmq never reconnects a
socket that ZAP has refused, or that received something damaged."""
PING_S = 1.0
"""So often a ping is sent over a control connection that carries nothing."""
REFUSED_S = 60.0
"""For so long status shows that something a member sent was refused."""


class Receiver(Protocol):
    """Takes what comes over a link."""

    def event(self, link: MemberLink, parts: Sequence[zmq.Frame]) -> None:
        """Take an event that the member has published."""

    def answer(self, link: MemberLink, parts: Sequence[zmq.Frame]) -> None:
        """Take a message on the control connection: it answers something that this node has asked."""

    def connected(self, link: MemberLink) -> None:
        """Note that the member can be asked for something."""

    def connection_lost(self, link: MemberLink) -> None:
        """Note that what was asked of the member will not be answered any more."""


class MemberLink:
    """The connections to one member, and the newest heartbeat from it."""

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        keys: NodeKeys,
        member: Member,
        receiver: Receiver,
    ) -> None:
        self.member = member
        self.heartbeat: Heartbeat | None = None
        self.reconnects = 0
        self._context = context
        self._loop = loop
        self._keys = keys
        self._receiver = receiver
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
    def can_be_asked(self) -> bool:
        """True while the control connection stands."""
        return self._control.established

    @property
    def key_refused(self) -> bool:
        """True when the member takes this node's key for that of a stranger."""
        return self._events.refused or self._control.refused

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

    def chain(self, origin: int) -> HeldChain | None:
        """Return what the member last said that it holds of a chain."""
        return self.heartbeat.chains.get(origin) if self.heartbeat else None

    def heard(self, heartbeat: Heartbeat) -> None:
        """Note a heartbeat."""
        self.heartbeat = heartbeat
        self._skew.note(heartbeat.time_us, time.time_ns() // 1000)

    def refuse(self, reason: str) -> None:
        """Note that something the member sent was refused."""
        self._refused, self._refused_at = reason, time.monotonic()

    def send(self, message: Mapping[str, Any], attachments: Attachments = ()) -> bool:
        """Send a control message; False when the member is not connected."""
        if not self._control.established:
            return False
        try:
            send_parts(self._control.socket, [pack(message), *attachments])
        except zmq.Again:
            return False
        return True

    def tick(self) -> None:
        """Replace the sockets when nothing was heard for long, or the control connection does not come back."""
        now = time.monotonic()
        if now - self._heard > REBUILD_AFTER_S:
            self.rebuild()
        elif not self._control_lives(now):
            # The events connection works, and must not lose anything because the control port is shut.
            self._renew_control()

    def _control_ended(self) -> None:
        if self._control.lasted_s > PING_S:
            self._renew_control()
        else:
            # This may happen again and again: libzmq reconnects, with growing pauses.
            self._receiver.connection_lost(self)

    def _renew_control(self) -> None:
        """Replace the control connection: what is queued in the old socket must not reach the member any more."""
        self._control.close()
        self._control = self._open_control(self._control.problem)
        self._receiver.connection_lost(self)

    def _control_lives(self, now: float) -> bool:
        """Return False when the control connection has been gone, or has not answered, for too long."""
        if not self._control.established:
            return now - self._control.changed <= REBUILD_AFTER_S
        if self._asked is None and now - self._answered >= PING_S:
            self._ping(now)
        return self._asked is None or now - self._asked <= REBUILD_AFTER_S

    def _ping(self, now: float) -> None:
        if self.send({"op": "ping", "id": 0}):
            self._asked = now

    def rebuild(self) -> None:
        """Close both connections and make new ones."""
        self.close()
        self.reconnects += 1
        self._heard = time.monotonic()
        self._events = self._open_events(self._events.problem)
        self._control = self._open_control(self._control.problem)
        self._receiver.connection_lost(self)

    def close(self) -> None:
        """Close both connections."""
        self._events.close()
        self._control.close()

    def _open_events(self, told: str = "") -> Connection:
        def receive(parts: list[zmq.Frame]) -> None:
            self._heard = time.monotonic()
            self._receiver.event(self, parts)

        return self._open(zmq.SUB, self.member.events, receive, lambda: None, lambda: None, told)

    def _open_control(self, told: str = "") -> Connection:
        self._asked, self._answered = None, time.monotonic()

        def receive(parts: list[zmq.Frame]) -> None:
            self._asked, self._answered = None, time.monotonic()
            self._receiver.answer(self, parts)

        def begun() -> None:
            # At once: whoever has said nothing yet counts as a stranger there.
            self._ping(time.monotonic())
            self._receiver.connected(self)

        return self._open(zmq.DEALER, self.member.control, receive, begun, self._control_ended, told)

    def _open(
        self, kind: int, port: int, receive: Callable[[list[zmq.Frame]], None], begun: Callable[[], None],
        ended: Callable[[], None], told: str,
    ) -> Connection:  # fmt: skip
        return Connection(
            self._context, self._loop, self._keys.current, self.member, kind, port,
            receive=receive, begun=begun, ended=ended, told=told,
        )  # fmt: skip
