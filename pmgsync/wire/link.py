"""A session with the local broker: how agent workers and the command line speak to it (PROTOCOL.md, section 10)."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pmgsync.errors import ProtocolError, UnreachableError
from pmgsync.wire.local import LocalConnection
from pmgsync.wire.messages import Message, unpack
from pmgsync.wire.peer import REPLY_TIMEOUT_S, Peer

CONNECT_S = 0.05
"""Seconds between two attempts to connect, while no broker is there."""


class LinkOverError(UnreachableError):
    """The session with the broker is over: its connection has ended."""


class BrokerLink(Peer):
    """A session with the broker of this node. It ends with its connection; the next one needs a new link.

    One thread may send while another receives.
    """

    def __init__(self, path: Path, worker: str) -> None:
        super().__init__(f"the broker at {path}")
        self.path = path
        self.worker = worker
        self._connection: LocalConnection | None = None
        self._poll = select.poll()
        self._closed = False

    def fileno(self) -> int:
        """Return the connection's descriptor; readable means that there may be a message."""
        return self._connected.fileno()

    @property
    def has_read(self) -> bool:
        """True when there is a message already, of which the descriptor tells nothing any more."""
        return bool(self._unasked or self._connected.messages)

    @property
    def _connected(self) -> LocalConnection:
        if self._connection is None:
            raise LinkOverError(f"{self.name} has closed the connection" if self._closed else f"{self.name} is not met")
        return self._connection

    def put(self, parts: Sequence[bytes]) -> None:
        try:
            self._connected.send_all(parts, REPLY_TIMEOUT_S)
        except LinkOverError:
            raise
        except UnreachableError as error:
            raise LinkOverError(f"{self.name} has closed the connection: {error.message}") from error

    def get(self, timeout_s: float) -> Sequence[bytes] | None:
        connection = self._connected
        messages = connection.messages
        if not messages and (timeout_s <= 0 or self._poll.poll(timeout_s * 1000)):
            try:
                connection.receive()
            except UnreachableError as error:
                if not messages:
                    raise LinkOverError(f"{self.name} has closed the connection") from error
            except ProtocolError as error:
                self.close()
                raise LinkOverError(f"{self.name} sends what cannot be read: {error.message}") from error
        return messages.popleft() if messages else None

    def pending(self) -> Iterator[tuple[Message, Sequence[bytes]]]:
        while self._unasked:
            yield self._unasked.popleft()
        parts = self.get(0)
        while parts is not None:
            yield unpack(parts[0]), parts[1:]
            # Not `get`: the descriptor tells when more has come.
            messages = self._connected.messages
            parts = messages.popleft() if messages else None

    def hello(self, timeout_s: float = REPLY_TIMEOUT_S) -> tuple[Message, Sequence[bytes]]:
        """Introduce this session; returns `welcome` with the signed cluster document attached when there is one.

        Raises:
            UnreachableError: when the broker is not running.
        """
        deadline = time.monotonic() + timeout_s
        while self._connection is None and not self._connect():
            if (left := deadline - time.monotonic()) <= 0:
                raise UnreachableError(
                    f"no broker answers on {self.path}", hint="start it: systemctl start pmgsync-broker"
                )
            time.sleep(min(CONNECT_S, left))
        return self.request({"op": "hello", "worker": self.worker, "pid": os.getpid()}, timeout_s=timeout_s)

    def _connect(self) -> bool:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        failed = made.connect_ex(os.fspath(self.path))
        if failed:
            made.close()
            if failed in {errno.EACCES, errno.EPERM}:
                raise UnreachableError(f"the socket {self.path} is closed to this user")
            return False
        self._connection = LocalConnection(made)
        self._poll.register(made, select.POLLIN)
        return True

    def close(self) -> None:
        """End the session; one that was ended already stays so."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
