"""A connection to one member's control port, for a node that has no broker in the cluster yet: the one that joins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from broker.cluster.door_client import Handshake
from broker.net import sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.frames import MAX_BODY
from pmgsync.core.membership import Member
from pmgsync.errors import UnreachableError
from pmgsync.wire.link import Peer

WRITABLE_MS = 5_000


@contextmanager
def remote_member(member: Member, keys: NodeKeys) -> Iterator[Peer]:
    """Yield a peer that speaks PROTOCOL.md's control messages with a member.

    Raises:
        UnreachableError: when it does not answer.
        MembershipError: when it refuses this node's key, or has another than the cluster document says.
    """
    context: zmq.Context[Socket] = zmq.Context()
    where = f"{member.address}:{member.control}"
    try:
        socket = sockets.open_socket(context, zmq.DEALER, max_bytes=MAX_BODY, hwm=sockets.CONTROL_HWM)
        handshake = Handshake(socket, where)
        try:
            sockets.connect(socket, keys, member.curve_key, member.address, member.control)
            handshake.wait()
        finally:
            handshake.close()
        if not socket.poll(WRITABLE_MS, zmq.POLLOUT):
            raise UnreachableError(f"{member.name} at {where} takes no messages")
        yield Peer(socket, f"{member.name} at {where}")
    finally:
        context.destroy(linger=200)
