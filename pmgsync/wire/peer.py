"""Requests and calls, over whatever carries the messages: the local socket, or a ZeroMQ connection to another node."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from pmgsync.errors import UnreachableError
from pmgsync.wire.messages import Message, error_from, pack, unpack

REPLY_TIMEOUT_S = 10.0
CALL_CREDIT = 4 << 20
"""Bytes of a call's result that may be under way at once."""
CALL_SILENCE_S = 60.0
"""A call that has sent nothing for so long is given up; a serving agent that waits sends a piece `wait` in between."""


class Peer(ABC):
    """Requests and calls over anything that carries PROTOCOL.md's control messages."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ids = itertools.count(1)
        self._unasked: deque[tuple[Message, Sequence[bytes]]] = deque()

    def new_id(self) -> int:
        """Return a request id that this session has not used."""
        return next(self._ids)

    @abstractmethod
    def put(self, parts: Sequence[bytes]) -> None:
        """Send a message's parts.

        Raises:
            UnreachableError: when the peer is gone, or takes no more.
        """

    @abstractmethod
    def get(self, timeout_s: float) -> Sequence[bytes] | None:
        """Return the parts of the next message, None when there was none in time.

        Raises:
            UnreachableError: when none will come any more.
        """

    def send(self, message: Mapping[str, Any], *attachments: bytes) -> None:
        """Send a message.

        Raises:
            UnreachableError: when the peer is gone, or takes no more.
        """
        self.put((pack(message), *attachments))

    def receive(self, timeout_s: float) -> tuple[Message, Sequence[bytes]] | None:
        """Return the next message and its attachments, None when there was none in time.

        Raises:
            UnreachableError: when none will come any more.
        """
        return self._unasked.popleft() if self._unasked else self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> tuple[Message, Sequence[bytes]] | None:
        parts = self.get(timeout_s)
        return None if parts is None else (unpack(parts[0]), parts[1:])

    def pending(self) -> Iterator[tuple[Message, Sequence[bytes]]]:
        """Yield the messages that have arrived, without waiting for more.

        Raises:
            UnreachableError: when none will come any more.
        """
        while (received := self.receive(0)) is not None:
            yield received

    def request(
        self, message: Mapping[str, Any], *attachments: bytes, timeout_s: float = REPLY_TIMEOUT_S
    ) -> tuple[Message, Sequence[bytes]]:
        """Send a request and return its answer; answers to earlier requests that were given up are dropped.

        What comes meanwhile and answers nothing, such as a new cluster document, is what `receive` returns next: it is
        sent only once.

        Raises:
            UnreachableError: when no answer came in time.
            PmgsyncError: the error that the peer answered with.
        """
        request = self.new_id()
        self.send({**message, "id": request}, *attachments)
        deadline = time.monotonic() + timeout_s
        while (received := self._receive(deadline - time.monotonic())) is not None:
            answer, parts = received
            if answer["op"] == "error" and answer.get("id") == 0:
                # Not an answer: the broker was restarted and does not know this session.
                raise error_from(answer)
            if not answer.get("id"):
                self._unasked.append(received)
            elif answer["id"] == request:
                if answer["op"] == "error":
                    raise error_from(answer)
                return answer, parts
        raise UnreachableError(f"{self.name} did not answer within {timeout_s:.0f} s")

    def call(
        self, method: str, args: Mapping[str, Any], *, target: int = 0, silence_s: float = CALL_SILENCE_S
    ) -> Generator[tuple[Message, Sequence[bytes]], None, None]:
        """Run a method of a node's agent and yield its `data` messages, then `done`; credit is given as they are taken.

        Args:
            target: CID of the node, when the peer is the local broker.

        Raises:
            UnreachableError: when nothing came for `silence_s` seconds.
            PmgsyncError: the error that the method ended with.
        """
        request = self.new_id()
        self.send(
            {"op": "call", "id": request, "target": target, "method": method, "args": args, "credit": CALL_CREDIT}
        )
        ended = False
        try:
            while (received := self._receive(silence_s)) is not None:
                answer, parts = received
                if answer.get("id") != request:
                    if not answer.get("id"):
                        self._unasked.append(received)
                    continue
                if answer["op"] == "error":
                    ended = True
                    raise error_from(answer)
                if answer["op"] == "done":
                    ended = True
                    yield answer, parts
                    return
                yield answer, parts
                if size := sum(map(len, parts)):
                    self.send({"op": "credit", "id": request, "bytes": size})
            raise UnreachableError(f"{self.name} sent nothing of {method!r} for {silence_s:.0f} s")
        finally:
            if not ended:
                self.send({"op": "cancel", "id": request})
