"""What the workers of this node's agent ask of the broker while the node is in a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.chains.chains import Chains
from broker.chains.streams import Stream
from broker.chains.synchronous import SynchronousCommits
from broker.heartbeats.heartbeat import Applied
from broker.members.calls import Attachments, Calls, Send
from broker.members.members import Members
from broker.requests.sessions import Session, Sessions
from broker.requests.shared import SharedRequests, answer_error, frame_sender, number
from pmgsync.core.announcements import MAX_ANNOUNCEMENT
from pmgsync.core.positions import Position
from pmgsync.errors import PmgsyncError, ProtocolError, ResyncRequiredError, UnknownChainError, UnreachableError
from pmgsync.wire.messages import Message, error_map

CAPTURE = "capture"
FILES = "files"
LEASE = "lease"


def apply_worker(origin: int) -> str:
    """Return the name of the worker that applies a node's chain."""
    return f"apply:{origin}"


class WorkerRequests:
    """Serves sessions on the local socket: capture, apply, and whoever calls or answers calls."""

    def __init__(
        self,
        cid: int,
        chains: Chains,
        members: Members,
        calls: Calls,
        sessions: Sessions,
        shared: SharedRequests,
        *,
        announce: Callable[[bytes], None],
        lease_told: Callable[[Message], None],
        later: Callable[[Callable[[], None]], None],
        knows_epoch: Callable[[], bool],
        chain_done: Callable[[int], None],
        synchronous: SynchronousCommits,
        applied: Callable[[int], None],
    ) -> None:
        """Begin.

        Args:
            announce: publishes what the files worker says of this node's trees.
            lease_told: takes what the lease worker says of a deadline that it has written.
            later: calls a function in a moment.
            knows_epoch: says whether the members have been heard since the start, so that a master that was replaced
                meanwhile knows it.
            chain_done: takes a node that was removed: this node's database is done with its chain.
            applied: called with the origin of a chain that was applied further.
        """
        self._cid = cid
        self._chains = chains
        self._members = members
        self._calls = calls
        self._sessions = sessions
        self._shared = shared
        self._announce = announce
        self._lease_told = lease_told
        self._later = later
        self._knows_epoch = knows_epoch
        self._chain_done = chain_done
        self._synchronous = synchronous
        self._applied = applied

    def handle(self, session: Session, send: Send, message: Message, attachments: Sequence[bytes]) -> bool:
        """Handle a request; False when it is none of these.

        Raises:
            PmgsyncError: when it is refused.
        """
        match message["op"]:
            case "frame":
                if len(attachments) != 2 or session.worker != CAPTURE:
                    raise ProtocolError("a frame is a header and a body, and comes from capture")
                whole = number(message, "whole") if "whole" in message else 0
                self._chains.own.take(attachments[0], attachments[1], whole)
            case "applied":
                position = Position.parse(message.get("position"))
                visible = Position.parse(message["visible"]) if "visible" in message else position
                whole = message.get("partial") is not True
                applied = Applied(number(message, "incarnation"), position, max(position, visible), whole)
                origin = number(message, "origin")
                self._chains.applied_moved(origin, applied)
                self._applied(origin)
            case "chain.done":
                origin = number(message, "origin")
                if session.worker != apply_worker(origin):
                    raise ProtocolError("only the worker that applies a chain says that it is done")
                self._chain_done(origin)
            case "watermark":
                self._chains.own.watermark(number(message, "lsn"), soon=message.get("soon") is True)
            case "synchronous.told":
                if session.worker != CAPTURE:
                    raise ProtocolError("only capture knows what the database waits for")
                self._synchronous.capture_told(stands=message.get("stands") is True)
            case "done" | "error":
                self.pass_on(session, message, attachments)
            case "announce":
                if len(attachments) != 1 or session.worker != FILES or len(attachments[0]) > MAX_ANNOUNCEMENT:
                    raise ProtocolError(f"an announcement is one part of at most {MAX_ANNOUNCEMENT} bytes, of trees")
                self._announce(attachments[0])
            case "lease.told":
                if session.worker != LEASE:
                    raise ProtocolError("only the lease worker writes deadlines")
                self._lease_told(message)
            case "chain.open":
                self._open_chain(send, message)
            case "chain.held":
                self._tell_held(send, message)
            case "apply.open":
                self._open_apply(session, send, message)
            case "call":
                target = number(message, "target") or self._cid
                self._shared.call(session.identity, send, message, target=target, caller=self._cid)
            case _:
                return self._shared.handle(session.identity, send, message)
        return True

    def pass_on(self, session: Session, message: Message, attachments: Attachments) -> None:
        """Pass what a worker answers a call with to the caller."""
        self._calls.from_server(session.identity, message, attachments)

    def _open_chain(self, send: Send, message: Message) -> None:
        if not self._knows_epoch():
            self._later(lambda: self._open_chain_later(send, message))
            return
        incarnation, start = number(message, "incarnation"), number(message, "start")
        position, whole = self._chains.open_own(incarnation, start, message.get("snapshot") is True)
        opened = {"op": "chain.opened", "id": number(message, "id"), "position": list(position)}
        send({**opened, "watermark": whole}, ())
        tell_durable(self._sessions, *self._chains.own.safe())
        self._synchronous.capture_began()

    def _open_chain_later(self, send: Send, message: Message) -> None:
        try:
            self._open_chain(send, message)
        except PmgsyncError as error:
            answer_error(send, message, error)

    def _open_apply(self, session: Session, send: Send, message: Message) -> None:
        request, origin = number(message, "id"), number(message, "origin")
        incarnation, position = self._begin_of_apply(origin, message)
        self._chains.follow(origin, incarnation, position)
        whole = message.get("partial") is not True
        self._chains.applied_moved(origin, Applied(incarnation, position, position, whole))

        def finish(at: Position, error: PmgsyncError | None) -> None:
            send(error_map(request, error or ResyncRequiredError(f"the stream ended at {at}")), ())

        opened = {"op": "apply.opened", "id": request, "incarnation": incarnation, "position": list(position)}
        send(opened, ())
        credit = number(message, "credit")
        stream = Stream(origin, position, credit, live=True, send=frame_sender(send, request), finish=finish)
        self._chains.streams.open(session.identity, request, stream)

    def _tell_held(self, send: Send, message: Message) -> None:
        origin = number(message, "origin")
        held = self._chains.held().get(origin)
        if held is None:
            raise UnknownChainError(f"no chain of node {origin} is held here")
        head = held.head.lsn if held.head.complete else held.head.lsn - 1
        own = self._chains.own.chain if origin == self._cid else None
        whole = max(head, own.watermark) if own is not None and own.incarnation == held.incarnation else head
        answer = {"op": "chain.held", "id": number(message, "id"), "incarnation": held.incarnation}
        since = self._chains.whole_since(origin, held)
        send({**answer, "since": since, "first": held.first.lsn, "head": head, "whole": whole}, ())

    def _begin_of_apply(self, origin: int, message: Message) -> tuple[int, Position]:
        """Return incarnation and position from which a worker gets frames.

        Raises:
            PmgsyncError: when it cannot get any.
        """
        if origin == self._cid:
            raise ProtocolError("the own chain is not applied here")
        incarnation, own = number(message, "incarnation"), self._members.own_chain(origin)
        if incarnation == 0:
            if own is None and self._members.link(origin) is None:
                return self._begin_of_departed(origin)
            if own is None:
                raise UnreachableError(f"nothing was heard of the chain of node {origin} yet")
            if own.snapshot:
                raise ResyncRequiredError(f"the chain of node {origin} can only be joined with a snapshot")
            return own.incarnation, Position(own.start)
        position = Position.parse(message.get("position"))
        if not position.complete:
            raise ProtocolError(f"{position} is in the middle of a transaction, which is never where apply stands")
        if own is not None and own.incarnation != incarnation:
            raise ResyncRequiredError(f"node {origin} has begun a new chain")
        return incarnation, position

    def _begin_of_departed(self, origin: int) -> tuple[int, Position]:
        """Return where the chain of a node that was removed begins, as far as somebody has it.

        Raises:
            UnreachableError: when nobody has anything of it.
        """
        held = [chain for link in self._members if link.up for chain in [link.chain(origin)] if chain is not None]
        if not held:
            raise UnreachableError(f"nobody has anything of the chain of node {origin}, which was removed")
        first = min(held, key=lambda chain: chain.first)
        return first.incarnation, first.first


def tell_durable(sessions: Sessions, position: Position, watermark: int) -> None:
    """Tell capture that the own chain is on disk up to a position, and known to be whole up to an LSN."""
    capture = sessions.worker(CAPTURE)
    if capture is not None:
        message = {"op": "durable", "position": list(position), "watermark": watermark}
        sessions.send(capture.identity, message)


def tell_apply(sessions: Sessions, origin: int, message: Mapping[str, Any]) -> None:
    """Send the worker that applies a chain a message, if there is one."""
    worker = sessions.worker(apply_worker(origin))
    if worker is not None:
        sessions.send(worker.identity, message)


def tell_synchronous(sessions: Sessions, message: Mapping[str, Any]) -> bool:
    """Send capture a message of synchronous mode; False when there is no capture."""
    capture = sessions.worker(CAPTURE)
    return capture is not None and sessions.send(capture.identity, message)


def tell_lease(sessions: Sessions, message: Message) -> bool:
    """Send the lease worker a message; False when there is none."""
    lease = sessions.worker(LEASE)
    return lease is not None and sessions.send(lease.identity, message)


def tell_announcement(sessions: Sessions, origin: int, data: bytes) -> None:
    """Hand what a member says of its trees to the files worker, if there is one."""
    files = sessions.worker(FILES)
    if files is not None:
        sessions.send(files.identity, {"op": "announced", "origin": origin}, (data,))
