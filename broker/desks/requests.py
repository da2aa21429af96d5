"""What the two desks (local sessions, members) share: streams and calls asked for by somebody, answered or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from broker.chains.streams import Stream
from broker.members.calls import End, Send
from pmgsync.core.frames import Frame
from pmgsync.core.positions import MAX_LSN, Position
from pmgsync.errors import PmgsyncError, ProtocolError, UnknownChainError
from pmgsync.wire.messages import Message, error_map

if TYPE_CHECKING:
    from broker.node import Broker

MAX_OPEN = 64
"""Streams and calls that one peer may have open."""


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
    """Check what every message may carry: it is looked up in tables, and a list in its place cannot be.

    Raises:
        ProtocolError: when the id is not an int.
    """
    if type(message.get("id", 0)) is not int:
        raise ProtocolError(f"{message['op']!r:.20} has an id that is not an int")


def frame_sender(send: Send, request: int) -> Callable[[Frame], bool]:
    """Return the function that sends frames of a stream to somebody."""
    first = {"op": "frame", "id": request}
    return lambda frame: send(first, (frame.header_bytes, frame.body))


def open_replay(broker: Broker, owner: object, send: Send, message: Message) -> None:
    """Begin a finite stream for somebody who asked to `replay`.

    Raises:
        PmgsyncError: when it cannot be served.
    """
    request, origin = number(message, "id"), number(message, "origin")
    head = broker.chain_heads().get(origin)
    if broker.streams is None or head is None or head.incarnation != number(message, "incarnation"):
        raise UnknownChainError(f"no such chain of node {origin} is held here")
    refuse_crowd(broker, owner)

    def finish(position: Position, error: PmgsyncError | None) -> None:
        send(error_map(request, error) if error else {"op": "end", "id": request, "position": list(position)}, ())

    position, credit = Position.parse(message.get("position")), number(message, "credit")
    stream = Stream(origin, position, credit, live=False, send=frame_sender(send, request), finish=finish)
    broker.streams.open(owner, request, stream)


def refuse_crowd(broker: Broker, owner: object) -> None:
    """Refuse one more stream or call to a peer that has too many.

    Raises:
        ProtocolError: when it has.
    """
    streams = broker.streams.count(owner) if broker.streams is not None else 0
    if streams + broker.calls.count(owner) >= MAX_OPEN:
        raise ProtocolError(f"more than {MAX_OPEN} streams and calls are open")


def common(broker: Broker, owner: object, send: Send, message: Message, attachments: Sequence[bytes]) -> bool:
    """Handle what means the same from a member and from a local session; False when it is something else.

    Raises:
        PmgsyncError: when the request is refused.
    """
    check_id(message)
    match message["op"]:
        case "replay":
            open_replay(broker, owner, send, message)
        case "credit":
            if not broker.calls.from_caller(owner, message) and broker.streams is not None:
                broker.streams.add_credit(owner, number(message, "id"), number(message, "bytes"))
        case "cancel":
            if not broker.calls.from_caller(owner, message) and broker.streams is not None:
                broker.streams.close(owner, number(message, "id"))
        case "ping":
            send({"op": "pong", "id": number(message, "id")}, ())
        case "document":
            signed = broker.signed
            parts = (signed.pack(),) if signed is not None else ()
            send({"op": "document", "id": number(message, "id")}, parts)
        case _:
            return False
    return True


def answer_error(send: Send, message: Message | None, error: PmgsyncError) -> None:
    """Tell a peer why its request was refused."""
    request = message.get("id", 0) if message else 0
    send(error_map(request if type(request) is int else 0, error), ())


def begin_call(broker: Broker, owner: object, send: Send, message: Message, target: int, caller: int) -> None:
    """Pass a call on, to this node's agent or to another member.

    Raises:
        PmgsyncError: when it cannot be.
    """
    refuse_crowd(broker, owner)
    end = End(owner, send, number(message, "id"))
    method = message.get("method")
    if not isinstance(method, str):
        raise ProtocolError("a call has no method")
    if target == broker.cid:
        broker.ask_agent(end, method, {**message, "caller": caller})
    else:
        broker.ask_member(end, target, message)
