"""Calls: requests to an agent, and the credited data they are answered with, passed on between sessions and members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_map

Attachments = Sequence[bytes | zmq.Frame]
"""What follows a message. What is only passed on stays a frame of libzmq: its bytes are not copied here."""
Send = Callable[[Mapping[str, Any], Attachments], bool]
"""Sends a message with attachments; returns False when the other end is gone."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a call: who it is (a session, a member, a connection), how to send to it, and its id for the call."""

    owner: object
    send: Send
    request: int


@dataclass(frozen=True, slots=True)
class Call:
    caller: End
    server: End


class Calls:
    """The calls that pass through this broker. It looks at op and id only; credit is kept by the two ends."""

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
        call = Call(caller, End(server_owner, server_send, request))
        self._by_caller[caller.owner, caller.request] = call
        self._by_server[server_owner, request] = call
        if not server_send({**message, "id": request}, attachments):
            self._forget(call)
            raise UnreachableError("the node that should answer is not connected")

    def from_server(self, owner: object, message: Message, attachments: Attachments) -> bool:
        """Pass `data`, `done` or `error` to the caller; False when no such call is open."""
        call = self._by_server.get((owner, message.get("id", 0)))
        if call is None:
            return False
        if message["op"] != "data":
            self._forget(call)
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
