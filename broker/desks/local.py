"""The local desk: this machine's own processes on the unix socket, agent workers and the command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from broker.chains.streams import Stream
from broker.desks.requests import answer_error, begin_call, check_id, common, frame_sender, number
from broker.desks.sessions import Session, Sessions
from broker.net.loop import Socket
from broker.status.heartbeats import Applied
from pmgsync.core.frames import read_frame
from pmgsync.core.positions import Position
from pmgsync.errors import (
    PmgsyncError,
    ProtocolError,
    ResyncRequiredError,
    UnknownOperationError,
    UnreachableError,
)
from pmgsync.wire.messages import Message, error_from, error_map, pack, unpack

if TYPE_CHECKING:
    from broker.node import Broker

log = logging.getLogger(__name__)


class LocalDesk:
    """Serves the local ROUTER, and hands answers from members to whoever waits for them here."""

    def __init__(self, broker: Broker, socket: Socket) -> None:
        self._broker = broker
        self._socket = socket
        self.sessions = Sessions(socket, self._gone)
        broker.loop.add_socket(socket, self._receive)

    def close(self) -> None:
        """Unbind."""
        self._broker.loop.remove(self._socket)
        self._socket.close()

    # -- from this machine --------------------------------------------------------------------------------------------

    def _receive(self, parts: list[zmq.Frame]) -> None:
        identity = parts[0].bytes

        def send(message: Mapping[str, Any], attachments: Sequence[bytes]) -> bool:
            return self.sessions.send(identity, message, attachments)

        message: Message | None = None
        try:
            if len(parts) < 2:
                raise ProtocolError("a local message is empty")
            message = unpack(parts[1].bytes)
            session = self.sessions.get(identity)
            if message["op"] == "hello":
                session = self.sessions.begin(identity, str(message.get("worker", "cli"))[:40], _pid(message))
                self._welcome(session, number(message, "id"))
            elif session is None:
                # The broker was restarted: the client must introduce itself again.
                parts_out = [identity, pack(error_map(0, UnreachableError("the broker was restarted")))]
                self._socket.send_multipart(parts_out, zmq.NOBLOCK)
            else:
                self._handle(session, send, message, [part.bytes for part in parts[2:]])
        except PmgsyncError as error:
            log.warning("action=refused-local op=%s error=%s", message and message["op"], error)
            answer_error(send, message, error)
        except zmq.ZMQError:
            log.warning("action=local-gone")

    def _handle(self, session: Session, send: Any, message: Message, attachments: Sequence[bytes]) -> None:
        broker = self._broker
        check_id(message)
        if message["op"] in {"data", "done", "error"}:
            broker.calls.from_server(session.identity, message, attachments)
            return
        if common(broker, session.identity, send, message, attachments):
            return
        match message["op"]:
            case "report":
                session.report(message)
            case "frame":
                if len(attachments) != 2 or session.worker != "capture":
                    raise ProtocolError("a frame is a header and a body, and comes from capture")
                broker.publishing().take(attachments[0], attachments[1])
            case "watermark":
                broker.publishing().watermark(number(message, "lsn"))
            case "applied":
                position = Position.parse(message.get("position"))
                origin = number(message, "origin")
                broker.applied_moved(origin, Applied(number(message, "incarnation"), position))
            case "chain.open":
                position = broker.publishing().open(
                    number(message, "incarnation"), number(message, "start"), message.get("snapshot") is True
                )
                durable, mark = broker.publishing().safe()
                opened = {"op": "chain.opened", "id": number(message, "id"), "position": list(position)}
                send({**opened, "watermark": mark}, ())
                self.tell_durable(durable, mark)
            case "apply.open":
                self._open_apply(session, send, message)
            case "serve":
                methods = message.get("methods", [])
                if not isinstance(methods, list):
                    raise ProtocolError("the methods to serve are not a list")
                session.methods = frozenset(map(str, methods))
            case "call":
                target = number(message, "target") or broker.cid
                begin_call(broker, session.identity, send, message, target, broker.cid)
            case "status":
                send({"op": "status", "id": number(message, "id"), "status": broker.health.status()}, ())
            case "token":
                broker.master_document()
                ttl_s = number(message, "ttl_s")
                token = broker.tokens.issue(ttl_s)
                send({"op": "token", "id": number(message, "id"), "token": token, "expires_s": ttl_s}, ())
            case "reload":
                broker.reload()
                send({"op": "done", "id": number(message, "id"), "result": {}}, ())
            case other:
                raise UnknownOperationError(f"the operation {other!r:.40} is not known here")

    def _welcome(self, session: Session, request: int) -> None:
        broker, signed = self._broker, self._broker.signed
        document = signed.document if signed is not None and broker.cid else None
        message = {
            "op": "welcome",
            "id": request,
            "cid": broker.cid,
            "epoch": document.epoch if document else 0,
            "serial": document.serial if document else 0,
        }
        parts = (signed.pack(),) if signed is not None and document is not None else ()
        self.sessions.send(session.identity, message, parts)

    def _open_apply(self, session: Session, send: Any, message: Message) -> None:
        broker = self._broker
        request, origin, incarnation = number(message, "id"), number(message, "origin"), number(message, "incarnation")
        if origin == broker.cid:
            raise ProtocolError("the own chain is not applied here")
        own = broker.heard_own(origin)
        if incarnation == 0:
            if own is None:
                raise UnreachableError(f"nothing was heard of the chain of node {origin} yet")
            if own.snapshot:
                raise ResyncRequiredError(f"the chain of node {origin} can only be joined with a snapshot")
            incarnation, position = own.incarnation, Position(own.start)
        else:
            position = Position.parse(message.get("position"))
            if not position.complete:
                raise ProtocolError(f"{position} is in the middle of a transaction, which is never where apply stands")
            if own is not None and own.incarnation != incarnation:
                raise ResyncRequiredError(f"node {origin} has begun a new chain")
        broker.follow(origin, incarnation, position)
        broker.applied_moved(origin, Applied(incarnation, position))

        def finish(at: Position, error: PmgsyncError | None) -> None:
            send(error_map(request, error or ResyncRequiredError(f"the stream ended at {at}")), ())

        opened = {"op": "apply.opened", "id": request, "incarnation": incarnation, "position": list(position)}
        send(opened, ())
        assert broker.streams is not None
        credit = number(message, "credit")
        stream = Stream(origin, position, credit, live=True, send=frame_sender(send, request), finish=finish)
        broker.streams.open(session.identity, request, stream)

    def _gone(self, session: Session) -> None:
        if session.worker != "cli":
            log.warning("action=worker-gone worker=%s", session.worker)
        if self._broker.streams is not None:
            self._broker.streams.close_owner(session.identity)
        reason = UnreachableError(f"the {session.worker} worker of {self._broker.config.name} went away")
        self._broker.calls.drop_owner(session.identity, reason)

    # -- to this machine ----------------------------------------------------------------------------------------------

    def tell_durable(self, position: Position, mark: int) -> None:
        """Tell capture that the own chain is on disk up to a position, and known to be whole up to an LSN."""
        capture = self.sessions.worker("capture")
        if capture is not None:
            self.sessions.send(capture.identity, {"op": "durable", "position": list(position), "watermark": mark})

    def spread_document(self) -> None:
        """Tell every worker that the cluster document has changed."""
        broker, signed = self._broker, self._broker.signed
        parts = (signed.pack(),) if signed is not None and broker.cid else ()
        for session in self.sessions.workers():
            self.sessions.send(session.identity, {"op": "document", "id": 0, "cid": broker.cid}, parts)

    def chain_replaced(self, origin: int, incarnation: int) -> None:
        """A member has begun a new chain: whoever applies the old one must start anew."""
        if self._broker.streams is not None:
            error = ResyncRequiredError(f"node {origin} has begun a new chain ({incarnation:016x})")
            self._broker.streams.fail(origin, error)

    def from_member(self, cid: int, parts: Sequence[bytes]) -> None:
        """Take an answer from a member: a frame of a replay, or data of a call.

        Raises:
            ProtocolError: when it is malformed.
        """
        broker, message = self._broker, unpack(parts[0])
        check_id(message)
        request = message.get("id", 0)
        match message["op"]:
            case "frame":
                if len(parts) != 3:
                    raise ProtocolError("a frame is a header and a body")
                frame = read_frame(parts[1], parts[2])
                follower = broker.followers.get(frame.header.origin)
                if follower is not None and frame.header.cluster == broker.document.cluster:
                    follower.replayed(request, frame)
            case "pong":
                pass
            case "end":
                for follower in list(broker.followers.values()):
                    follower.ended(request)
            case "document":
                if len(parts) == 2:
                    broker.offer_document(parts[1])
            case "data" | "done":
                broker.calls.from_server(("peer", cid), message, parts[1:])
            case "error":
                if not broker.calls.from_server(("peer", cid), message, parts[1:]):
                    for follower in list(broker.followers.values()):
                        follower.failed(request, error_from(message))
            case "cancel":
                for follower in list(broker.followers.values()):
                    follower.failed(request, UnreachableError(f"node {cid} broke the replay off"))
            case other:
                raise UnknownOperationError(f"the operation {other!r:.40} is not known here")


def _pid(message: Message) -> int:
    """Return the process that a `hello` names, 0 when it names none."""
    pid = message.get("pid", 0)
    return pid if type(pid) is int and 0 < pid < 1 << 22 else 0
