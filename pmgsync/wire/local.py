"""Messages of several parts on a stream socket between two processes of one machine (PROTOCOL.md, section 10).

Not ZeroMQ here: its threads, one at each end, made four of the changes of thread that a lone transaction waits for. A
message is the number of its parts, the length of each, and the parts; numbers are 4 bytes, the highest first.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from pmgsync.core.frames import MAX_BODY
from pmgsync.errors import ProtocolError, UnreachableError

MAX_PARTS = 4_096
MAX_BYTES = MAX_BODY + (1 << 20)
"""Bytes of a message's parts; the longest is a frame with a single huge row."""
MAX_WAITING = 64 << 20
"""Bytes that may wait for a reader. Those who read stay far below it, with credit of some MiB a stream or call."""
BUFFER_BYTES = 256 << 10
TURN_BYTES = 2 << 20
"""So much is read before others get their turn."""
KERNEL_BYTES = 1 << 20
"""What the kernel is asked to hold for a reader; it gives what its own limit allows."""
_WORD = 4
_COUNT = struct.Struct(">I")
_VECTORS = 1_000
"""Parts that are sent without being copied together; the kernel takes 1,024."""


Part = bytes | memoryview


def head(sizes: Sequence[int]) -> bytes:
    """Return what stands before parts of these sizes."""
    return struct.pack(f">{len(sizes) + 1}I", len(sizes), *sizes)


class Splitter:
    """Takes bytes as they come and gives messages: whoever reads puts them into `room`, and says how many they were."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._small = self._view = memoryview(bytearray(buffer_bytes))
        self._have = 0
        self.messages: deque[list[bytes]] = deque()

    @property
    def room(self) -> memoryview:
        """Where the next bytes are to be put; never empty."""
        return self._view[self._have :] if self._have else self._view

    def took(self, count: int) -> None:
        """Note that so many bytes were put into the room.

        Raises:
            ProtocolError: when they cannot be a message's.
        """
        view, have, begun = self._view, self._have + count, 0
        while True:
            needed, left = _WORD, have - begun
            if left < needed:
                break
            (parts,) = _COUNT.unpack_from(view, begun)
            if not 0 < parts <= MAX_PARTS:
                raise ProtocolError(f"a local message says that it has {parts} parts")
            needed += _WORD * parts
            if left < needed:
                break
            sizes = struct.unpack_from(f">{parts}I", view, begun + _WORD)
            at, needed = begun + needed, needed + sum(sizes)
            if needed > MAX_BYTES:
                raise ProtocolError(f"a local message says that it has {needed} bytes")
            if left < needed:
                break
            message = []
            for size in sizes:
                message.append(bytes(view[at : at + size]))
                at += size
            self.messages.append(message)
            begun = at
        self._keep(begun, have, needed)

    def _keep(self, begun: int, have: int, needed: int) -> None:
        """Go on with a message of which what stands from `begun` to `have` is here, and so much is needed."""
        view, size = self._view, have - begun
        self._have = size
        if needed > len(view):
            self._view = memoryview(bytearray(needed))
        elif view is not self._small and needed <= len(self._small):
            self._view = self._small
        elif not begun:
            return
        if size:
            self._view[:size] = bytes(view[begun:have])


class LocalConnection:
    """One end of a connection; nothing here waits but `send_all`. Closed by whoever made it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        self._socket = connection
        self._receive, self._send = connection.recv_into, connection.send
        self._splitter = Splitter()
        self.messages = self._splitter.messages
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = self._largest = 0

    def fileno(self) -> int:
        """Return the descriptor; readable means that `receive` finds something."""
        return self._socket.fileno()

    @property
    def is_waiting(self) -> bool:
        """True while `flush` has something to send."""
        return bool(self._waiting)

    def receive(self) -> None:
        """Read what is there, which is in `messages` then.

        Raises:
            UnreachableError: when the other end has closed the connection; `messages` has what came before.
            ProtocolError: when it says what cannot be a message.
        """
        splitter, taken = self._splitter, 0
        while taken < TURN_BYTES:
            room = splitter.room
            try:
                count = self._receive(room)
            except BlockingIOError:
                return
            except OSError as error:
                raise UnreachableError(f"the connection has ended ({error.strerror})") from error
            if not count:
                raise UnreachableError("the other end has closed the connection")
            splitter.took(count)
            if count < len(room):
                return
            taken += count

    def send(self, parts: Sequence[Part]) -> bool:
        """Send a message; False: `flush` has to send the rest of it, when the kernel takes more.

        Raises:
            UnreachableError: when the connection has ended, or too much waits for the other end; nothing more can be
                sent then.
        """
        sizes = [len(part) for part in parts]
        first = head(sizes)
        size = len(first) + sum(sizes)
        if self._waiting:
            if self._waiting_bytes > MAX_WAITING + self._largest:
                raise UnreachableError(f"{self._waiting_bytes} bytes wait for the other end, which reads nothing")
            self._wait(size, [first, *parts])
            return False
        try:
            if len(parts) < _VECTORS:
                sent = self._socket.sendmsg([first, *parts])
            else:
                parts, first = (), b"".join([first, *parts])
                sent = self._send(first)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise UnreachableError(f"the connection has ended ({error.strerror})") from error
        if sent == size:
            return True
        self._largest = 0
        self._wait(size - sent, [memoryview(b"".join([first, *parts]))[sent:]])
        return False

    def _wait(self, size: int, rest: Sequence[Part]) -> None:
        # A message that is larger than all that may wait goes through, and those after it wait as long as without it.
        self._largest = max(self._largest, size)
        self._waiting += map(memoryview, rest)
        self._waiting_bytes += size

    def flush(self) -> bool:
        """Send what waits, as much as the kernel takes; True when nothing waits any more.

        Raises:
            UnreachableError: when the connection has ended.
        """
        waiting = self._waiting
        while waiting:
            part = waiting[0]
            try:
                sent = self._send(part)
            except BlockingIOError:
                return False
            except OSError as error:
                raise UnreachableError(f"the connection has ended ({error.strerror})") from error
            self._waiting_bytes -= sent
            if sent == part.nbytes:
                waiting.popleft()
            else:
                waiting[0] = part[sent:]
        return True

    def send_all(self, parts: Sequence[Part], timeout_s: float) -> None:
        """Send a message, and wait until the other end has taken enough of it for the kernel to hold the rest.

        Raises:
            UnreachableError: when the connection has ended, or the other end takes nothing for so long; nothing more
                can be sent then.
        """
        if self.send(parts):
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while not self.flush():
            if not poll.poll(timeout_s * 1000):
                raise UnreachableError(f"the other end takes nothing for {timeout_s:.0f} s")

    def close(self) -> None:
        """Close; what waits is not sent."""
        self._waiting.clear()
        with suppress(OSError):
            self._socket.close()
