"""A connection to one member's control port, for a node that has no broker in the cluster yet: the one that joins."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import zmq

from broker.cluster.door_client import Handshake
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.frames import MAX_BODY
from pmgsync.core.membership import Member
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.dealer import DealerPeer
from pmgsync.wire.peer import Peer

log = logging.getLogger(__name__)

WRITABLE_MS = 5_000
REPORT_S = 2.0


@contextmanager
def remote_member(member: Member, keys: NodeKeys) -> Iterator[Peer]:
    """Yield a peer that speaks PROTOCOL.md's control messages with a member.

    Raises:
        UnreachableError: when it does not answer.
        MembershipError: when it refuses this node's key, or has another than the cluster document says.
    """
    where = f"{member.name} at {member.address}:{member.control}"
    with remote_control(where, member.address, member.control, member.curve_key, keys) as peer:
        yield peer


@contextmanager
def remote_control(name: str, address: str, port: int, server_key: bytes, keys: NodeKeys) -> Iterator[Peer]:
    """Yield a peer that speaks PROTOCOL.md's control messages with the node that has a CURVE public key.

    Raises:
        UnreachableError: when it does not answer.
        MembershipError: when it refuses this node's key, or has another one.
    """
    context: zmq.Context[Socket] = zmq.Context()
    try:
        socket = sockets.open_socket(context, zmq.DEALER, max_bytes=MAX_BODY, hwm=sockets.CONTROL_HWM)
        handshake = Handshake(socket, f"{address}:{port}")
        try:
            sockets.connect(socket, keys, server_key, address, port)
            handshake.wait()
        except zmq.ZMQError as error:
            raise UnreachableError(f"{address}:{port} is not an address to connect to ({error.strerror})") from error
        finally:
            handshake.close()
        if not socket.poll(WRITABLE_MS, zmq.POLLOUT):
            raise UnreachableError(f"{name} takes no messages")
        yield DealerPeer(socket, name)
    finally:
        context.destroy(linger=200)


class JoinReporter:
    """Tells the master every other second how far this node's copy is, on a connection and in a thread of its own.

    The copy itself may be silent for long, while indexes are built; the master removes a joining node that is silent.
    """

    def __init__(self, master: Member, keys: NodeKeys, progress: Callable[[], Mapping[str, Any]]) -> None:
        """Begin when entered; `progress` returns phase, bytes, rows and bytes_total."""
        self._master = master
        self._keys = keys
        self._progress = progress
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="join-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._failed = kind is not None
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with remote_member(self._master, self._keys) as peer:
                    while not self._over.wait(REPORT_S):
                        peer.send({"op": "join.progress", **self._progress()})
                    if self._failed:
                        peer.send({"op": "join.abandoned"})
            except PmgsyncError as error:
                # The copy reports that the master is away: it cannot go on without it.
                log.debug("action=join-progress error=%s", error)
                self._over.wait(REPORT_S)
