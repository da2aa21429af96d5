"""The connections that others have made to one bound port: why they fail, and how many there may be.

libzmq takes every connection, and neither limits them nor says anything of the handshakes that fail. Its monitor tells
of each connection by its file descriptor, which is enough to learn its address, and to end it: who has sent no message
yet is a stranger, and strangers may have only so many connections. The one that waits longest is ended first, so a
flood leaves a member the time to get through.

An event says which connection it is about only when that begins or ends. A handshake fails just before the
connection's end, in the same thread, so the two go together.
"""

from __future__ import annotations

import ipaddress
import itertools
import resource
import socket as tcp
import struct
from contextlib import suppress
from dataclasses import dataclass

import zmq

from broker.net import handshakes
from broker.net.backlog import Backlog, duplicate
from broker.net.loop import Loop, Socket
from broker.net.refusals import Refusals

WAITING_OF_ADDRESS = 100
"""Connections from one address to one port that have sent no message. Members send one at once."""
WAITING_IN_ALL = 512
"""The same, from all addresses."""
OF_MEMBER = 8
"""Connections of one member to one port. It has one, and old ones whose end has not been noticed yet."""
SUBSCRIPTIONS, TOPIC_BYTES = 16, 16
"""Of one connection, and the length of each. A member subscribes once, to everything; libzmq keeps what it is sent."""
DESCRIPTORS = 1024
"""What the broker needs for itself, with room to spare: what is left of the limit is for strangers."""
PORTS = 4
TOO_MANY = "too many connections"
TOO_MUCH = "it subscribes to too many topics, or too long ones"

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | handshakes.FAILED
_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection.

    Attributes:
        address: without the prefix of an IPv4 address on an IPv6 socket; "" when it was gone before it could be asked.
        place: address and port of the other end, which nobody else has while this connection lasts.
        group: what is counted as one address.
        member: whom its first message came from, "" before that.
        identity: what libzmq calls it, on control.
        messages: how many came from it, counted for events, where they are subscriptions.
        ended: True when it was ended here.
    """

    address: str
    place: tuple[str, int]
    group: str
    member: str = ""
    identity: bytes = b""
    messages: int = 0
    ended: bool = False


class Incoming:
    """The connections to one port, from the events of its monitor; made before the socket is bound."""

    def __init__(
        self, context: zmq.Context[Socket], loop: Loop, socket: Socket, port: int, purpose: str, refusals: Refusals
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._port = port
        self._purpose = purpose
        self._refusals = refusals
        self._in_all = waiting_in_all()
        self._peers: dict[int, _Peer] = {}
        self._waiting: dict[int, None] = {}
        self._groups: dict[str, dict[int, None]] = {}
        self._members: dict[str, dict[int, None]] = {}
        self._backlogs: dict[bytes, Backlog] = {}
        self._failed: tuple[int, int] | None = None
        self._accounted = 0
        endpoint = f"inproc://incoming-{next(_numbers)}"
        socket.monitor(endpoint, _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        # libzmq's thread waits until an event can be queued, and holds a lock that ending the monitor needs: with a
        # limit, a flood while this loop is busy would stop both for good.
        self._monitor.rcvhwm = 0
        self._monitor.linger = 0
        self._monitor.connect(endpoint)
        loop.add_socket(self._monitor, self._take)

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        self._loop.remove(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close()

    # -- what libzmq tells --------------------------------------------------------------------------------------------

    def _take(self, parts: list[zmq.Frame]) -> None:
        event, value = struct.unpack("=HI", parts[0].bytes)
        if event == zmq.EVENT_ACCEPTED:
            self._begun(value)
        elif event == zmq.EVENT_DISCONNECTED:
            self._over(value)
        elif event in {zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH}:
            # Not said of which connection; its end will come without a reason.
            self._accounted += 1
        else:
            self._failed = event, value

    def _begun(self, descriptor: int) -> None:
        self._drop(descriptor)
        peer = _look_at(descriptor, self._port)
        self._peers[descriptor] = peer
        self._waiting[descriptor] = None
        of_address = self._groups.setdefault(peer.group, {})
        of_address[descriptor] = None
        if len(of_address) > min(WAITING_OF_ADDRESS, self._in_all):
            self._end(next(iter(of_address)))
        elif len(self._waiting) > self._in_all:
            self._end(next(iter(self._waiting)))

    def _over(self, descriptor: int) -> None:
        failed, self._failed = self._failed, None
        peer = self._drop(descriptor)
        if peer is None or peer.member:
            return
        if failed is not None:
            if not peer.ended:
                self._refusals.note(self._purpose, peer.address, handshakes.refusal(*failed))
        elif self._accounted > 0:
            self._accounted -= 1
        elif not peer.ended:
            self._refusals.note(self._purpose, peer.address, handshakes.NO_ZMTP)

    def _drop(self, descriptor: int) -> _Peer | None:
        """Forget a connection; libzmq ends some without telling, and their descriptors are used again."""
        peer = self._peers.pop(descriptor, None)
        if peer is not None:
            self._forget_waiting(descriptor, peer)
            self._backlogs.pop(peer.identity, None)
            mine = self._members.get(peer.member, {})
            mine.pop(descriptor, None)
            if not mine:
                self._members.pop(peer.member, None)
        return peer

    def takes(self, identity: bytes, parts: int, size: int) -> bool:
        """Say whether a peer may be sent a message; False while too much waits for it."""
        backlog = self._backlogs.get(identity)
        return backlog is None or backlog.takes(parts, size)

    def heard(self, parts: list[zmq.Frame]) -> None:
        """Note that a message came: its sender is a member, and not counted as a stranger."""
        part = parts[-1]
        try:
            descriptor, member = int(str(part.get("__fd"))), str(part.get("User-Id"))
        except zmq.ZMQError:
            return  # libzmq itself unsubscribes whoever has gone away
        if not member.isdecimal():
            return  # a node that was removed
        peer = self._peers.get(descriptor)
        if peer is None:
            self._catch_up()
            peer = self._peers.get(descriptor)
        if peer is None or peer.ended:
            return
        if self._purpose == "events":
            peer.messages += 1
            if peer.messages > SUBSCRIPTIONS or len(part) > 1 + TOPIC_BYTES:
                self._end(descriptor, TOO_MUCH)
                return
        if peer.member:
            return
        peer.member = member
        if self._purpose != "events":
            peer.identity = parts[0].bytes
            self._backlogs[peer.identity] = Backlog(descriptor, peer.place)
        self._accounted -= 1
        self._forget_waiting(descriptor, peer)
        mine = self._members.setdefault(member, {})
        mine[descriptor] = None
        if len(mine) > OF_MEMBER:
            oldest = next(iter(mine))
            del mine[oldest]
            self._end(oldest)

    def _catch_up(self) -> None:
        with suppress(zmq.Again):
            while True:
                self._take(self._monitor.recv_multipart(zmq.NOBLOCK, copy=False))

    # -- limits -------------------------------------------------------------------------------------------------------

    def _forget_waiting(self, descriptor: int, peer: _Peer) -> None:
        self._waiting.pop(descriptor, None)
        of_address = self._groups.get(peer.group)
        if of_address is not None:
            of_address.pop(descriptor, None)
            if not of_address:
                del self._groups[peer.group]

    def _end(self, descriptor: int, reason: str = TOO_MANY) -> None:
        """End a connection; libzmq takes it for an end by the other side."""
        peer = self._peers[descriptor]
        self._forget_waiting(descriptor, peer)
        peer.ended = True
        self._refusals.note(self._purpose, peer.address, reason)
        with suppress(OSError), duplicate(descriptor) as same:
            if same.getpeername()[:2] == peer.place:
                same.shutdown(tcp.SHUT_RDWR)


def waiting_in_all() -> int:
    """Return how many connections of strangers one port may have, as the limit of file descriptors allows it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(WAITING_IN_ALL, (limit - DESCRIPTORS) // PORTS)) if limit >= 0 else WAITING_IN_ALL


def plain_address(address: str) -> str:
    """Return an address as a person writes it: an IPv4 address on an IPv6 socket has a prefix."""
    return address.removeprefix("::ffff:")


def _look_at(descriptor: int, port: int) -> _Peer:
    """Return whose connection it is; nobody's when it is gone already."""
    try:
        with duplicate(descriptor) as same:
            if same.getsockname()[1] == port:
                host, number = same.getpeername()[:2]
                address = plain_address(host)
                return _Peer(address, (host, number), _group(address))
    except OSError:
        pass
    return _Peer("", ("", 0), "")


def _group(address: str) -> str:
    """Return what counts as one address: of IPv6, a machine has a whole network of 64 bits to choose from."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
