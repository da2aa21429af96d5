"""Requests that mean the same from a member and from this machine: replays, calls, pings, the document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.chains.chains import Chains
from broker.chains.streams import Stream
from broker.members.calls import Calls, End, Send
from broker.members.members import Members, peer
from broker.requests.sessions import Sessions
from pmgsync.core.frames import Frame
from pmgsync.core.positions import MAX_LSN, Position
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnknownChainError, UnreachableError
from pmgsync.wire.messages import Message, error_map

MAX_OPEN = 64
"""Streams and calls that one peer may have open."""
FACTS_CREDIT = 1 << 20
"""Bytes that a call of this broker itself may be answered with."""


def number(message: Mapping[str, Any], key: str, *, highest: int = MAX_LSN) -> int:
    """Return an unsigned integer of a message.

    Raises:
        ProtocolError: when it is missing or anything else.
    """
    value = message.get(key)
    if type(value) is not int or not 0 <= value <= highest:
        raise ProtocolError(f"{message.get('op')!r:.20} has {key}={value!r:.40}, expected an unsigned integer")
    return value


def check_id(message: Mapping[str, Any]) -> None:
    """Check the id that a message may carry: it is looked up in tables, where a list would be an error.

    Raises:
        ProtocolError: when the id is not an int.
    """
    if type(message.get("id", 0)) is not int:
        raise ProtocolError(f"{message['op']!r:.20} has an id that is not an int")


def frame_sender(send: Send, request: int) -> Callable[[Sequence[Frame]], bool]:
    """Return the function that sends frames of a stream to somebody."""
    first = {"op": "frame", "id": request}
    return lambda frames: send(first, [part for frame in frames for part in (frame.header_bytes, frame.body)])


def answer_error(send: Send, message: Message | None, error: PmgsyncError) -> None:
    """Tell a peer why its request was refused."""
    request = message.get("id", 0) if message else 0
    send(error_map(request if type(request) is int else 0, error), ())


class SharedRequests:
    """Serves streams and calls; an owner is whoever asked: a session, or one connection of a member."""

    def __init__(
        self,
        cid: int,
        name: str,
        chains: Chains,
        members: Members,
        calls: Calls,
        sessions: Sessions,
        *,
        document: Callable[[], bytes],
    ) -> None:
        """Begin.

        Args:
            cid, name: of this node.
            document: returns the packed cluster document in force.
        """
        self._cid = cid
        self._name = name
        self._chains = chains
        self._members = members
        self._calls = calls
        self._sessions = sessions
        self._document = document

    def handle(self, owner: object, send: Send, message: Message) -> bool:
        """Handle a request; False when it is none of these.

        Raises:
            PmgsyncError: when the request is refused.
        """
        check_id(message)
        match message["op"]:
            case "replay":
                self._replay(owner, send, message)
            case "credit":
                if not self._calls.from_caller(owner, message):
                    self._chains.streams.add_credit(owner, number(message, "id"), number(message, "bytes"))
            case "cancel":
                if not self._calls.from_caller(owner, message):
                    self._chains.streams.close(owner, number(message, "id"))
            case "ping":
                send({"op": "pong", "id": number(message, "id")}, ())
            case "document":
                send({"op": "document", "id": number(message, "id")}, (self._document(),))
            case _:
                return False
        return True

    def call(self, owner: object, send: Send, message: Message, *, target: int, caller: int) -> None:
        """Pass a call on, to this node's agent or to another member.

        Args:
            target, caller: CIDs.

        Raises:
            PmgsyncError: when it cannot be.
        """
        self._check_open(owner)
        end = End(owner, send, number(message, "id"))
        method = message.get("method")
        if not isinstance(method, str):
            raise ProtocolError("a call has no method")
        if target == self._cid:
            self.ask_agent(end, method, {**message, "caller": caller})
        elif self._members.link(target) is None:
            raise MembershipError(f"no member has CID {target}")
        else:
            self._calls.begin(end, peer(target), lambda reply, parts: self._members.send(target, reply, parts), message)

    def ask_agent(self, caller: End, method: str, message: Message | None = None) -> None:
        """Run a method of this node's agent for somebody.

        Raises:
            UnreachableError: when no worker serves it now.
        """
        session = self._sessions.serving(method)
        if session is None:
            raise UnreachableError(f"the agent of {self._name} is not running", hint="start pmgsync-agent there")
        identity = session.identity
        self._calls.begin(
            caller,
            identity,
            lambda reply, parts: self._sessions.send(identity, reply, parts),
            message or {"op": "call", "method": method, "args": {}, "credit": FACTS_CREDIT},
        )

    def close_streams(self, owner: object) -> None:
        """End the streams of a peer that is gone, or does not read what it asked for."""
        self._chains.streams.close_owner(owner)

    def _replay(self, owner: object, send: Send, message: Message) -> None:
        request, origin = number(message, "id"), number(message, "origin")
        head = self._chains.heads().get(origin)
        if head is None or head.incarnation != number(message, "incarnation"):
            raise UnknownChainError(f"no such chain of node {origin} is held here")
        self._check_open(owner)

        def finish(position: Position, error: PmgsyncError | None) -> None:
            send(error_map(request, error) if error else {"op": "end", "id": request, "position": list(position)}, ())

        position, credit = Position.parse(message.get("position")), number(message, "credit")
        stream = Stream(origin, position, credit, live=False, send=frame_sender(send, request), finish=finish)
        self._chains.streams.open(owner, request, stream)

    def _check_open(self, owner: object) -> None:
        """Refuse one more stream or call to a peer that has too many."""
        if self._chains.streams.count(owner) + self._calls.count(owner) >= MAX_OPEN:
            raise ProtocolError(f"more than {MAX_OPEN} streams and calls are open")
