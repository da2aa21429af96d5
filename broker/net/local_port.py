"""The local socket: a unix socket that this machine's own processes connect to, and the connections it has."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from broker.net.loop import Loop
from pmgsync.errors import ConfigError, ProtocolError, UnreachableError
from pmgsync.wire.local import LocalConnection

log = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_AGAIN_S = 1.0
"""A process that has no descriptors left takes no connections for so long."""

Receive = Callable[[bytes, list[bytes]], None]


class LocalPort:
    """Takes connections, and messages over them; each connection has an identity that no other one had before it."""

    def __init__(self, loop: Loop, path: Path) -> None:
        """Bind a socket of mode 0600 in a directory of mode 0700. Who connects is taken from `open` on.

        Raises:
            ConfigError: when the directory cannot be made, or the socket cannot be bound.
        """
        self._loop = loop
        self._path = path
        self._numbers = itertools.count(1)
        self._connections: dict[bytes, LocalConnection] = {}
        self._receive: Receive = lambda identity, parts: None
        self._gone: Callable[[bytes], None] = lambda identity: None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"the run directory {path.parent} cannot be made ({error.strerror})") from error
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        umask = os.umask(0o177)
        try:
            # One that a killed broker has left; that none runs, the hold on the state directory says.
            path.unlink(missing_ok=True)
            self._listener.bind(os.fspath(path))
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"the local socket {path} cannot be bound ({error.strerror})") from error
        finally:
            os.umask(umask)

    def open(self, receive: Receive, gone: Callable[[bytes], None]) -> None:
        """Take connections from now on.

        Args:
            receive: called with the identity of a connection and each message that comes over it.
            gone: called with the identity of a connection that has ended.
        """
        self._receive, self._gone = receive, gone
        self._listen()

    def close(self) -> None:
        """Unbind, and end all connections. What waits in them is not sent."""
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for identity in list(self._connections):
            self._end(identity)

    def send(self, identity: bytes, parts: Sequence[bytes | zmq.Frame]) -> bool:
        """Send to one connection; False when it has ended, or is ended now because nobody reads there."""
        connection = self._connections.get(identity)
        if connection is None:
            return False
        try:
            if not connection.send([part if isinstance(part, bytes) else part.buffer for part in parts]):
                self._loop.await_room(connection.fileno(), waits=True)
        except UnreachableError as error:
            log.warning("action=local-gone reason=%s", error.message)
            self._end(identity)
            return False
        return True

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_descriptor(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            made, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("action=local-refused reason=%s", error.strerror)
            self._loop.remove(self._listener.fileno())
            self._loop.once(ACCEPT_AGAIN_S, self._listen)
            return
        identity = b"%d" % next(self._numbers)
        connection = self._connections[identity] = LocalConnection(made)
        self._loop.add_descriptor(connection.fileno(), lambda: self._ready(identity, connection))

    def _ready(self, identity: bytes, connection: LocalConnection) -> None:
        """Send what waits and take what has come, which may end this connection too."""
        ended: str | None = None
        try:
            if connection.is_waiting and connection.flush():
                self._loop.await_room(connection.fileno(), waits=False)
            connection.receive()
        except UnreachableError:
            ended = ""
        except ProtocolError as error:
            ended = error.message
        messages = connection.messages
        while messages and identity in self._connections:
            self._receive(identity, messages.popleft())
        if ended is not None:
            if ended:
                log.warning("action=local-refused reason=%s", ended)
            self._end(identity)
            self._gone(identity)

    def _end(self, identity: bytes) -> None:
        connection = self._connections.pop(identity, None)
        if connection is not None:
            self._loop.remove(connection.fileno())
            with suppress(OSError):
                connection.close()
