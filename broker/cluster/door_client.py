"""The newcomer's side of the join door (PROTOCOL.md, section 5): asks the master to be let in."""

from __future__ import annotations

import errno
import time
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.cluster.door import PROTOCOL_VERSION
from broker.cluster.key_port import KNOWN_PUBLIC
from broker.net import handshakes, sockets
from broker.net.keys import NodeKeys
from broker.net.loop import Socket
from pmgsync.core.members import KEY_BYTES
from pmgsync.core.membership import MAX_DOCUMENT, Member, SignedDocument, format_fingerprint
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnreachableError
from pmgsync.wire.dealer import DealerPeer

CONNECT_S = 10.0
REFUSED_S = 2.0
"""For so long a port that refuses connections counts as about to be bound, after that as closed."""
ANSWER_S = 15.0
"""The master asks its database before it answers."""


class Handshake:
    """Watches a DEALER's first connection. When the server has another key than expected, libzmq just stays silent;
    only the socket's monitor tells."""

    def __init__(self, socket: Socket, where: str) -> None:
        self._where = where
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_ALL)

    def wait(self, timeout_s: float = CONNECT_S) -> None:
        """Return when the connection stands.

        Raises:
            UnreachableError: when nothing answers there.
            MembershipError: when what answers does not hold the key that was expected, or refuses this node's.
        """
        begun = time.monotonic()
        connected = False
        while (left := begun + timeout_s - time.monotonic()) > 0:
            if not self._monitor.poll(round(left * 1000) + 1):
                break
            told = parse_monitor_message(self._monitor.recv_multipart())
            event = told["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise MembershipError(f"the node at {self._where} refuses this node's key")
            if event == zmq.EVENT_CONNECTED:
                connected = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and told["value"] == errno.EAGAIN:
                break
            elif event == zmq.EVENT_DISCONNECTED or handshakes.is_without_curve(event, told["value"]):
                raise UnreachableError(
                    f"what answers at {self._where} is not a pmgsync master, or of an incompatible version",
                    hint="check address and port",
                )
            elif event & handshakes.FAILED:
                raise MembershipError(
                    f"the fingerprint does not match the key of the node at {self._where}",
                    hint="copy the whole line that `pmgcm join-cmd` prints on the master; if it is the same, "
                    "something else answers at that address",
                )
            elif event == zmq.EVENT_CONNECT_RETRIED and time.monotonic() - begun > REFUSED_S:
                raise UnreachableError(
                    # libzmq does not tell which of the two it was.
                    f"the master at {self._where} is unreachable: the connection was refused, or nothing leads there",
                    hint="check address, port and firewall, and that pmgsync-broker runs on the master",
                )
        if connected:
            raise UnreachableError(
                f"the master at {self._where} takes the connection but does not answer",
                hint="check address and port, and that pmgsync-broker on the master is well",
            )
        raise UnreachableError(
            f"the master at {self._where} is unreachable: no connection within {timeout_s:.0f} s",
            hint="check address, port and firewall",
        )

    def close(self) -> None:
        """Stop watching."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


class DoorClient:
    """A connection to a master's join door; `with` opens it.

    Args:
        address, port: of the door.
        server_key: the fingerprint's 32 bytes.
        keys: this node's.
    """

    def __init__(self, address: str, port: int, server_key: bytes, keys: NodeKeys) -> None:
        self._address, self._port = address, port
        self._server_key = server_key
        self._keys = keys
        self._context: zmq.Context[Socket] = zmq.Context()
        self._peer: DealerPeer | None = None

    def __enter__(self) -> Self:
        where = f"{self._address}:{self._port}"
        socket = sockets.open_socket(self._context, zmq.DEALER, max_bytes=MAX_DOCUMENT + sockets.JOIN_MAX_BYTES)
        handshake = Handshake(socket, where)
        try:
            try:
                sockets.connect(socket, self._keys, self._server_key, self._address, self._port)
            except zmq.ZMQError as error:
                raise UnreachableError(f"{where} is not an address to connect to ({error.strerror})") from error
            handshake.wait()
        except BaseException:
            handshake.close()
            self._context.destroy(linger=0)
            raise
        handshake.close()
        self._peer = DealerPeer(socket, f"the master at {where}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    def check(self, member: Member, *, token: str = "", password: str | None = None) -> dict[str, Any]:
        """Return the facts of the cluster that a newcomer checks before it joins; nothing is used up.

        Args:
            member: this node as it is going to ask to be admitted.
            token, password: one of them proves that this node may join. The `token` in the answer is the one to go on
                with: after a password it is a new one, for this node only.

        Raises:
            MembershipError: when the master does not accept it.
            UnreachableError: when the master, or its database, does not answer.
        """
        proof = {"token": token} if password is None else {"password": password}
        facts, _ = self._ask({"op": "check", **proof, **_place(member)})
        if facts.get("protocol") != PROTOCOL_VERSION:
            raise MembershipError(
                f"the master speaks protocol version {facts.get('protocol')!r:.20}, this node {PROTOCOL_VERSION}",
                hint="install the same version of pmgsync on all nodes",
            )
        return facts

    def admit(self, token: str, member: Member) -> tuple[int, SignedDocument]:
        """Become a member: use the token up, and return this node's CID and the signed cluster document.

        Raises:
            MembershipError: when the master refuses, or answers with something that does not hold.
        """
        request = {
            "op": "admit",
            "token": token,
            **_place(member),
        }
        answer, parts = self._ask(request)
        if answer["op"] != "admitted" or len(parts) != 1:
            raise ProtocolError(f"{self._name} answered an admission with {answer['op']!r:.40}")
        signed = SignedDocument.unpack(parts[0])
        master = signed.document.member(signed.document.master)
        # The fingerprint is the root of all trust here: the document must be its owner's.
        if master is None or master.curve_key != self._server_key:
            raise MembershipError(
                f"{self._name} sent a cluster document whose master has another key than "
                f"{format_fingerprint(self._server_key)}"
            )
        signed.verify(signed.document)
        own = signed.document.by_key(member.curve_key)
        if own is None or own.cid != answer.get("cid"):
            raise ProtocolError(f"{self._name} sent a cluster document that this node is not in")
        return own.cid, signed

    @property
    def _name(self) -> str:
        return f"the master at {self._address}:{self._port}"

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        assert self._peer is not None
        try:
            return self._peer.request(request, timeout_s=ANSWER_S)
        except PmgsyncError:
            raise
        except Exception as error:  # any shape may come
            raise ProtocolError(f"{self._name} answered with something malformed ({error})") from error


def _place(member: Member) -> dict[str, Any]:
    """Return what a newcomer says of itself."""
    return {
        "version": PROTOCOL_VERSION,
        "name": member.name,
        "address": member.address,
        "events": member.events,
        "control": member.control,
        "join": member.join,
        "role": member.role,
        "level": member.level,
        "host_keys": dict(member.host_keys),
        "curve_key": member.curve_key,
        "sign_key": member.sign_key,
    }


def fetch_key(address: str, port: int) -> bytes:
    """Ask a master's key port for its CURVE public key, 32 bytes. Nothing proves that the master has answered.

    Raises:
        UnreachableError: when nobody answers there.
        ProtocolError: when what answers does not speak this protocol.
    """
    where = f"{address}:{port}"
    public, secret = zmq.curve_keypair()
    context: zmq.Context[Socket] = zmq.Context()
    try:
        socket = sockets.open_socket(context, zmq.DEALER)
        handshake = Handshake(socket, where)
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, KNOWN_PUBLIC
        try:
            socket.connect(sockets.endpoint(address, port))
            handshake.wait()
        except zmq.ZMQError as error:
            raise UnreachableError(f"{where} is not an address to connect to ({error.strerror})") from error
        except MembershipError as error:
            raise ProtocolError(
                f"what answers at {where} is not the key port of a pmgsync master",
                hint="check address and port; the master's [ports] key says where it is",
            ) from error
        finally:
            handshake.close()
        answer, _ = DealerPeer(socket, f"the master at {where}").request({"op": "key"}, timeout_s=ANSWER_S)
        key = answer.get("curve_key")
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ProtocolError(f"the master at {where} answered with a key that is none")
        return key
    finally:
        context.destroy(linger=0)
