"""Calls: requests to an agent, and the credited data they are answered with, passed on between sessions and members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from pmgsync.errors import PmgsyncError, ProtocolError, UnreachableError
from pmgsync.wire.messages import Message, error_map

Attachments = Sequence[bytes | zmq.Frame]
"""What follows a message. What is only passed on stays a frame of libzmq: its bytes are not copied here."""
Send = Callable[[Mapping[str, Any], Attachments], bool]
"""Sends a message with attachments; returns False when the other end is gone."""
SLACK_BYTES = 4 << 20
"""Beyond the credit of a call: the last piece may exceed it, and messages around the pieces are not counted in it."""
CREDIT_SHARE = 16
"""The messages around pieces may have one byte for so many bytes of credit."""
MAX_ROOM = 1 << 40
MAX_ATTACHMENTS = 1_000
"""Of one message; the local socket takes no more than `pmgsync.wire.local.MAX_PARTS`."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a call: who it is (a session, a member, a connection), how to send to it, and its id for the call."""

    owner: object
    send: Send
    request: int


@dataclass(slots=True)
class Call:
    """`room`: bytes that the server may still send, its messages themselves among them."""

    caller: End
    server: End
    room: int = field(compare=False)

    def give(self, credit: object) -> None:
        """Note that the caller takes so many bytes more."""
        if type(credit) is int and credit > 0:
            self.room = min(self.room + credit + credit // CREDIT_SHARE, MAX_ROOM)


class Calls:
    """The calls that pass through this broker.

    Credit is kept by the two ends. A server that sends much more than it was given is cut off here: what it sends would
    fill the memory of this broker and of the process that has called.
    """

    def __init__(self, new_id: Callable[[], int]) -> None:
        self._new_id = new_id
        self._by_caller: dict[tuple[object, int], Call] = {}
        self._by_server: dict[tuple[object, int], Call] = {}

    def begin(
        self,
        caller: End,
        server_owner: object,
        server_send: Send,
        message: Message,
        attachments: Attachments = (),
    ) -> None:
        """Pass a `call`, or another request that ends with `done` or `error`, on to who serves it, under an id of ours.

        Raises:
            UnreachableError: when the server is not there.
        """
        request = self._new_id()
        call = Call(caller, End(server_owner, server_send, request), SLACK_BYTES)
        call.give(message.get("credit"))
        self._by_caller[caller.owner, caller.request] = call
        self._by_server[server_owner, request] = call
        if not server_send({**message, "id": request}, attachments):
            self._forget(call)
            raise UnreachableError("the node that should answer is not connected")

    def from_server(self, owner: object, message: Message, attachments: Attachments, first_bytes: int = 0) -> bool:
        """Pass `data`, `done` or `error` to the caller; False when no such call is open.

        Args:
            first_bytes: the size of the message itself.

        Raises:
            ProtocolError: when the server sends more than it was asked for; the call is over then.
        """
        call = self._by_server.get((owner, message.get("id", 0)))
        if call is None:
            return False
        call.room -= first_bytes + sum(map(len, attachments))
        is_last = message["op"] != "data"
        too_much = len(attachments) > MAX_ATTACHMENTS or (call.room < 0 and not is_last)
        if is_last or too_much:
            self._forget(call)
        if too_much:
            error = ProtocolError("more came in answer to a call than was asked for")
            call.server.send({"op": "cancel", "id": call.server.request}, ())
            call.caller.send(error_map(call.caller.request, error), ())
            raise error
        if not call.caller.send({**message, "id": call.caller.request}, attachments):
            self._forget(call)
            call.server.send({"op": "cancel", "id": call.server.request}, ())
        return True

    def from_caller(self, owner: object, message: Message) -> bool:
        """Pass `credit` or `cancel` to the server; False when no such call is open."""
        call = self._by_caller.get((owner, message.get("id", 0)))
        if call is None:
            return False
        if message["op"] == "cancel":
            self._forget(call)
        else:
            call.give(message.get("bytes"))
        if not call.server.send({**message, "id": call.server.request}, ()) and message["op"] != "cancel":
            self._forget(call)
            call.caller.send(error_map(call.caller.request, UnreachableError("the node that answers is gone")), ())
        return True

    def count(self, owner: object) -> int:
        """Return how many calls an owner has open as a caller."""
        return sum(key[0] == owner for key in self._by_caller)

    def drop_owner(self, owner: object, reason: PmgsyncError) -> None:
        """End all calls of a session or member that is gone, and tell the other ends."""
        for call in [call for key, call in self._by_caller.items() if key[0] == owner]:
            self._forget(call)
            call.server.send({"op": "cancel", "id": call.server.request}, ())
        for call in [call for key, call in self._by_server.items() if key[0] == owner]:
            self._forget(call)
            call.caller.send(error_map(call.caller.request, reason), ())

    def _forget(self, call: Call) -> None:
        self._by_caller.pop((call.caller.owner, call.caller.request), None)
        self._by_server.pop((call.server.owner, call.server.request), None)
