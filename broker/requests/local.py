"""The local socket: sessions of this machine's own processes, agent workers and the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from broker.members.calls import Attachments, Send
from broker.net.local_port import LocalPort
from broker.requests.sessions import Session, Sessions
from broker.requests.shared import answer_error, check_id, number
from pmgsync.core.membership import SignedDocument
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownOperationError, UnreachableError
from pmgsync.wire.messages import Message, error_map, unpack

log = logging.getLogger(__name__)

MAX_WORKER_NAME = 40


class Handler(Protocol):
    """Serves some of the operations of the local socket."""

    def handle(self, session: Session, send: Send, message: Message, attachments: Sequence[bytes]) -> bool:
        """Handle a request; False when it is none of these. Raises PmgsyncError when it is refused."""


class Workers(Handler, Protocol):
    """Serves what workers ask, and answers for them."""

    def pass_on(self, session: Session, message: Message, attachments: Attachments) -> None:
        """Pass what a worker answers a call with to the caller."""


class LocalRequests:
    """Receives on the local socket and passes each request to the handler of its operation."""

    def __init__(
        self,
        port: LocalPort,
        sessions: Sessions,
        *,
        admin: Handler,
        workers: Callable[[], Workers],
        membership: Callable[[], tuple[int, SignedDocument | None]],
        splits: Callable[[], Mapping[int, int]],
        departed: Callable[[], list[int]],
    ) -> None:
        """Begin.

        Args:
            admin: serves what is possible with and without a cluster.
            workers: returns who serves the rest; raises MembershipError when no cluster is defined.
            membership: returns this node's CID and the document in force; 0 and None when no cluster is defined.
            splits: returns who is on another side of a split, and that side's newest epoch.
            departed: returns who was removed and whose chain is not over here.
        """
        self._port = port
        self._sessions = sessions
        self._admin = admin
        self._workers = workers
        self._membership = membership
        self._splits = splits
        self._departed = departed
        port.open(self._receive, sessions.over)

    def close(self) -> None:
        """Unbind."""
        self._port.close()

    def spread_document(self) -> None:
        """Tell every worker that the cluster document has changed."""
        cid, signed = self._membership()
        parts = (signed.pack(),) if signed is not None else ()
        for session in self._sessions.workers():
            message = {"op": "document", "id": 0, "cid": cid, "split": self._split(), "departed": self._departed()}
            self._sessions.send(session.identity, message, parts)

    def _split(self) -> list[list[int]]:
        return [[cid, epoch] for cid, epoch in self._splits().items()]

    def _receive(self, identity: bytes, parts: list[bytes]) -> None:
        def send(message: Mapping[str, Any], attachments: Attachments) -> bool:
            return self._sessions.send(identity, message, attachments)

        message: Message | None = None
        try:
            message = unpack(parts[0])
            session = self._sessions.get(identity)
            if message["op"] == "hello":
                worker = str(message.get("worker", "cli"))[:MAX_WORKER_NAME]
                self._welcome(self._sessions.begin(identity, worker, _pid(message)), number(message, "id"))
            elif session is None:
                # The broker was restarted: the client must introduce itself again.
                send(error_map(0, UnreachableError("the broker was restarted")), ())
            else:
                self._handle(session, send, message, parts[1:])
        except PmgsyncError as error:
            log.warning("action=refused-local op=%s error=%s", message and message["op"], error)
            answer_error(send, message, error)

    def _handle(self, session: Session, send: Send, message: Message, attachments: Sequence[bytes]) -> None:
        check_id(message)
        match message["op"]:
            case "data":
                # The bulk of what comes here: passed on as it is.
                self._workers().pass_on(session, message, attachments)
            case "report":
                session.report(message)
            case "ping":
                send({"op": "pong", "id": number(message, "id")}, ())
            case "serve":
                methods = message.get("methods", [])
                if not isinstance(methods, list):
                    raise ProtocolError("the methods to serve are not a list")
                session.methods = frozenset(map(str, methods))
            case other:
                if self._admin.handle(session, send, message, attachments):
                    return
                if not self._workers().handle(session, send, message, attachments):
                    raise UnknownOperationError(f"the operation {other!r:.40} is not known here")

    def _welcome(self, session: Session, request: int) -> None:
        cid, signed = self._membership()
        message = {
            "op": "welcome",
            "id": request,
            "cid": cid,
            "epoch": signed.document.epoch if signed else 0,
            "serial": signed.document.serial if signed else 0,
            "split": self._split(),
            "departed": self._departed(),
        }
        self._sessions.send(session.identity, message, (signed.pack(),) if signed is not None else ())


def _pid(message: Message) -> int:
    """Return the process that a `hello` names, 0 when it names none."""
    pid = message.get("pid", 0)
    return pid if type(pid) is int and 0 < pid < 1 << 22 else 0
