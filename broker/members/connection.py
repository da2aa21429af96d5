"""One connecting socket and its monitor: libzmq itself does not say why nothing comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.net import handshakes, sockets
from broker.net.keys import KeyPair
from broker.net.loop import Loop, Socket
from pmgsync.core.frames import MAX_BODY
from pmgsync.core.membership import Member

log = logging.getLogger(__name__)

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | handshakes.FAILED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
)


class Connection:
    """A SUB or DEALER socket connected to a member.

    Attributes:
        problem: why there is no connection, "" while there is one.
        refused: True from when the member refuses this node's key. libzmq does not try again then.
        established: True from the handshake to the end of the connection.
        changed: when `established` last changed, or the socket was made.
        lasted_s: for how long the newest connection that has ended was established.
    """

    def __init__(
        self,
        context: zmq.Context[Socket],
        loop: Loop,
        keys: KeyPair,
        member: Member,
        kind: int,
        port: int,
        *,
        receive: Callable[[list[zmq.Frame]], None],
        begun: Callable[[], None],
        ended: Callable[[], None],
        told: str = "",
    ) -> None:
        """Connect.

        Args:
            receive: takes each message.
            begun, ended: are called when the connection is established, and when that is over.
            told: the problem of the connection that this one replaces: it is in the log already.
        """
        self.problem = ""
        self.refused = False
        self.established = False
        self.changed = time.monotonic()
        self.lasted_s = 0.0
        self._explained = False
        self._told = told
        self._member = member
        self._where = f"{member.name} ({member.cid}) at {member.address}:{port}"
        self._loop = loop
        self._begun = begun
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
            # The address comes from the member itself: one that libzmq does not accept must not stop this broker.
            self._note(f"{self._where} is not an address to connect to ({error.strerror})")

    def close(self) -> None:
        """Close the socket and its monitor."""
        for socket in (self._monitor, self.socket):
            self._loop.remove(socket)
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)

    def _watch(self, parts: list[zmq.Frame]) -> None:
        told = parse_monitor_message([part.bytes for part in parts])
        event, greeted = told["event"], self.established
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                problem = ""
            case zmq.EVENT_CONNECTED:
                self._explained = False
                return
            case zmq.EVENT_DISCONNECTED if self._explained:
                problem = self.problem
            case zmq.EVENT_DISCONNECTED if greeted:
                problem = f"{self._where} closed the connection"
            case zmq.EVENT_DISCONNECTED:
                problem = handshakes.no_zmtp(self._where)
            case zmq.EVENT_CONNECT_RETRIED:
                problem = self.problem or f"{self._where} does not accept connections"
            case _ if greeted:
                problem = f"what came from {self._where} was damaged on the way"
            case _:
                problem = handshakes.failure(event, told["value"], self._where)
        # The disconnect that follows says less than the reason that came before it.
        self._explained = bool(event & handshakes.FAILED)
        self.established = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        self.refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or (self.refused and not self.established)
        if self.established != greeted:
            now = time.monotonic()
            self.lasted_s, self.changed = now - self.changed if greeted else self.lasted_s, now
        self._note(problem)
        if greeted and not self.established:
            self._ended()
        elif self.established and not greeted:
            self._begun()

    def _note(self, problem: str) -> None:
        if problem and problem not in {self.problem, self._told}:
            log.warning("action=link-problem cid=%d problem=%s", self._member.cid, problem)
        if problem != self._told:
            self._told = ""
        self.problem = problem
