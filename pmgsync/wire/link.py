"""A session with the local broker: how agent workers and the command line speak to it (PROTOCOL.md, section 10)."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from pmgsync.errors import UnreachableError
from pmgsync.wire.messages import Message, error_from, pack, unpack
from pmgsync.wire.parts import has_message, receive_parts, send_parts

REPLY_TIMEOUT_S = 10.0
CALL_CREDIT = 4 << 20
"""Bytes of a call's result that may be under way at once."""
CALL_SILENCE_S = 60.0
"""A call that has sent nothing for so long is given up; a serving agent that waits sends a piece `wait` in between."""


class Peer:
    """Requests and calls over any DEALER that speaks PROTOCOL.md's control messages."""

    def __init__(self, socket: zmq.Socket[bytes], name: str) -> None:
        self.socket = socket
        self.name = name
        self._ids = itertools.count(1)
        self._unasked: deque[tuple[Message, Sequence[bytes]]] = deque()

    def new_id(self) -> int:
        """Return a request id that this session has not used."""
        return next(self._ids)

    def send(self, message: Mapping[str, Any], *attachments: bytes) -> None:
        """Send a message.

        Raises:
            UnreachableError: when the peer takes no more.
        """
        try:
            send_parts(self.socket, [pack(message), *attachments])
        except zmq.Again:
            raise UnreachableError(f"{self.name} takes no messages") from None

    def receive(self, timeout_s: float) -> tuple[Message, Sequence[bytes]] | None:
        """Return the next message and its attachments, None when there was none in time."""
        return self._unasked.popleft() if self._unasked else self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> tuple[Message, Sequence[bytes]] | None:
        if not self.socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return self._next()

    def _next(self) -> tuple[Message, Sequence[bytes]]:
        first, *attachments = receive_parts(self.socket)
        return unpack(first.bytes), [part.bytes for part in attachments]

    def pending(self) -> Iterator[tuple[Message, Sequence[bytes]]]:
        """Yield the messages that have arrived, without waiting for more."""
        while self._unasked:
            yield self._unasked.popleft()
        while has_message(self.socket):
            yield self._next()

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


class BrokerLink(Peer):
    """A session with the broker of this node. It ends with its connection; the next one needs a new link."""

    def __init__(self, path: Path, worker: str, *, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        self._own_context = context is None
        self._context = context or zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0  # bounded by credit, not by number
        # Not ZMQ_IMMEDIATE: see broker/net/sockets.py. The monitor tells when a connection begins and ends.
        socket.reconnect_ivl = 50
        socket.reconnect_ivl_max = 500
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._begun = self._ended = False
        socket.connect(f"ipc://{path}")
        super().__init__(socket, f"the broker at {path}")
        self.path = path
        self.worker = worker

    def send(self, message: Mapping[str, Any], *attachments: bytes) -> None:
        """Send a message.

        Raises:
            UnreachableError: when the connection has ended: libzmq would keep the message for the next one, in which
                the broker knows nothing of this session.
        """
        if has_message(self._monitor):
            self._watch(0)
        if self._ended:
            raise UnreachableError(f"{self.name} has closed the connection")
        super().send(message, *attachments)

    def _watch(self, timeout_s: float) -> None:
        """Wait for events of the monitor and take them over."""
        while self._monitor.poll(round(timeout_s * 1000)):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            self._ended = self._ended or (self._begun and event == zmq.EVENT_DISCONNECTED)
            self._begun = self._begun or event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            timeout_s = 0

    def hello(self, timeout_s: float = REPLY_TIMEOUT_S) -> tuple[Message, Sequence[bytes]]:
        """Introduce this session; returns `welcome` with the signed cluster document attached when there is one.

        Raises:
            UnreachableError: when the broker is not running.
        """
        deadline = time.monotonic() + timeout_s
        while not self._begun:
            if (left := deadline - time.monotonic()) <= 0:
                raise UnreachableError(
                    f"no broker answers on {self.path}", hint="start it: systemctl start pmgsync-broker"
                )
            self._watch(left)
        return self.request({"op": "hello", "worker": self.worker, "pid": os.getpid()}, timeout_s=timeout_s)

    def close(self) -> None:
        """End the session; one that was ended already stays so."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=200)
        if self._own_context:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
