"""CurveZMQ sockets with the protocol's options."""

from __future__ import annotations

import errno

import zmq

from broker.net.keys import KeyPair, NodeKeys
from broker.net.loop import Socket
from pmgsync.errors import ConfigError

DEAD_MS = 5_000
"""How long TCP may go without an acknowledgement, or with a peer that reads nothing. ZMTP's heartbeats are not used:
libzmq 4.3.5 aborts the process ("Assertion failed: !_io_error", its issues 4364 and 4767) when one falls due on a
connection that has ended while its receive queue was full. `broker.members.link` notices silence above TCP."""
HANDSHAKE_MS = 4_500
"""How long a handshake may take: less than the silence after which `broker.members.link` replaces a socket, or why
nothing comes would never be told."""
EVENTS_HWM = 1_000
"""Frames of at most 64 KiB (larger only for single huge rows): 64 MiB for a subscriber that stalls."""
CONTROL_HWM = 10_000
"""Messages, most of them small; `broker.net.backlog` bounds the large ones."""
TAKEN_HWM = 200
"""Messages from one peer, of at most 1 MiB, that wait for the broker's loop; more wait at the sender's."""
CONTROL_MAX_BYTES = 1 << 20
JOIN_MAX_BYTES = 64 << 10
JOIN_HWM = 100


class PortInUseError(ConfigError):
    """A port is in use, perhaps only for an instant by a socket that this process has just closed."""


def open_socket(
    context: zmq.Context[Socket],
    kind: int,
    *,
    max_bytes: int = JOIN_MAX_BYTES,
    hwm: int = EVENTS_HWM,
    rcvhwm: int = 0,
) -> Socket:
    """Return a socket with the options that all TCP sockets share.

    `max_bytes` bounds what comes in, also what a stranger sends instead of a handshake: it must be set for whatever
    binds, even for a PUB that receives nothing but subscriptions. `hwm` and `rcvhwm` are
    messages for and from each peer.
    """
    socket = context.socket(kind)
    socket.linger = 0
    socket.ipv6 = True
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, rcvhwm or hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.TCP_MAXRT, DEAD_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    # Not ZMQ_IMMEDIATE: with it, libzmq 4.3.5 aborts the process ("Assertion failed: !_more") when a connection ends
    # while the parts of one of its messages are being read.
    return socket


def endpoint(address: str, port: int) -> str:
    """Return the ZeroMQ endpoint of an address, IPv6 addresses in brackets."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def serve(socket: Socket, secret_key: bytes, address: str, port: int, purpose: str) -> None:
    """Make a socket a CURVE server and bind it; `purpose` is the ZAP domain.

    Raises:
        PortInUseError: when the port is in use.
        ConfigError: when the address is not one of this machine's.
    """
    socket.curve_server = True
    socket.curve_secretkey = secret_key
    socket.setsockopt(zmq.ZAP_DOMAIN, purpose.encode())
    try:
        socket.bind(endpoint(address, port))
    except zmq.ZMQError as error:
        kind = PortInUseError if error.errno == errno.EADDRINUSE else ConfigError
        raise kind(
            f"the {purpose} port {port} on {address} cannot be bound ({error.strerror})",
            hint=f"free it, or set another one: [ports] {purpose} in node.toml",
        ) from error


def connect(socket: Socket, keys: KeyPair | NodeKeys, server_key: bytes, address: str, port: int) -> None:
    """Make a socket a CURVE client of a node whose public key is known, and connect it."""
    socket.curve_publickey = keys.curve_public
    socket.curve_secretkey = keys.curve_secret
    socket.curve_serverkey = server_key
    socket.connect(endpoint(address, port))
