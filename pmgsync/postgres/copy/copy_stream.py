"""COPY as a stream: psycopg2 knows it only as one blocking call, so the call runs in a thread behind a short queue."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import psycopg2
import psycopg2.extensions

CHUNK_BYTES = 256 << 10
"""Rows are collected up to this many bytes."""
MAX_CHUNK_BYTES = 1 << 20
"""The protocol's limit for an attachment; a row that is longer goes on in the next chunk."""
QUEUED_CHUNKS = 4
POLL_S = 0.2

Connection = psycopg2.extensions.connection


class _AbandonedError(Exception):
    """Ends a COPY that nobody waits for any more."""


class CopyOut:
    """Rows of one query in COPY text format; iterate over it, then `close` it, early or not.

    Memory is bounded: at most `QUEUED_CHUNKS` chunks wait, and the server is left waiting meanwhile.
    """

    def __init__(self, connection: Connection, statement: bytes) -> None:
        self._connection = connection
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(QUEUED_CHUNKS)
        self._abandoned = threading.Event()
        self._pending: list[bytes] = []
        self._size = 0
        # Not Thread.join: when a signal's exception ends it, the thread counts as ended although it runs.
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(statement,), name="copy-out", daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        """Yield chunks of whole rows of at most `MAX_CHUNK_BYTES`, and longer rows in parts.

        Raises:
            psycopg2.Error: when the server ends the COPY.
        """
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            for start in range(0, len(item), MAX_CHUNK_BYTES):
                yield item[start : start + MAX_CHUNK_BYTES]

    def close(self) -> None:
        """End the COPY; when it was not over, the session is of no more use."""
        self._abandoned.set()
        while not self._over.is_set():
            with contextlib.suppress(psycopg2.Error):
                self._connection.cancel()
            self._over.wait(POLL_S)

    def write(self, row: bytes) -> int:
        """Take one row; psycopg2 calls this in the thread."""
        if self._size + len(row) > CHUNK_BYTES:
            self._flush()
        self._pending.append(row)
        self._size += len(row)
        return len(row)

    def read(self, size: int = -1) -> bytes:
        """Not for reading; psycopg2 demands it of a file."""
        raise _AbandonedError

    def _flush(self) -> None:
        if self._pending:
            self._put(b"".join(self._pending))
            self._pending, self._size = [], 0

    def _put(self, item: bytes | BaseException | None) -> None:
        while True:
            if self._abandoned.is_set():
                raise _AbandonedError
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=POLL_S)
                return

    def _run(self, statement: bytes) -> None:
        try:
            with self._connection.cursor() as cursor:
                cursor.copy_expert(statement, self)
            self._flush()
            self._put(None)
        except _AbandonedError:
            return
        except Exception as error:
            with contextlib.suppress(_AbandonedError):
                self._put(error)
        finally:
            self._over.set()


class CopyIn:
    """Takes rows in COPY text format, in pieces of any size, and gives them to one COPY FROM STDIN."""

    def __init__(self, connection: Connection, statement: bytes) -> None:
        self._connection = connection
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUED_CHUNKS)
        self._abandoned = threading.Event()
        self._rest = memoryview(b"")
        self._ended = False
        self._error: BaseException | None = None
        self._copied = 0
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(statement,), name="copy-in", daemon=True).start()

    def feed(self, data: bytes) -> None:
        """Take a piece.

        Raises:
            psycopg2.Error: when the server refused what was fed until now.
        """
        self._put(data)

    def finish(self) -> int:
        """End the COPY and return the number of rows that it wrote.

        Raises:
            psycopg2.Error: when the server refused the rows.
        """
        self._put(None)
        while not self._over.wait(POLL_S):
            pass
        if self._error is not None:
            raise self._error
        return self._copied

    def close(self) -> None:
        """Give up, if it is not finished; the COPY fails and writes nothing."""
        self._abandoned.set()
        while not self._over.is_set():
            with contextlib.suppress(psycopg2.Error):
                self._connection.cancel()
            self._over.wait(POLL_S)

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, b"" at the end; psycopg2 calls this in the thread."""
        while not self._rest:
            if self._ended:
                return b""
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                if self._abandoned.is_set():
                    raise _AbandonedError from None
                continue
            if item is None:
                self._ended = True
            else:
                self._rest = memoryview(item)
        data = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return data

    def readline(self, size: int = -1) -> bytes:
        """Not for lines; psycopg2 demands it of a file and does not use it."""
        return self.read(size)

    def _put(self, item: bytes | None) -> None:
        while True:
            if self._over.is_set():
                raise self._error or psycopg2.InterfaceError("the COPY is over")
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=POLL_S)
                return

    def _run(self, statement: bytes) -> None:
        try:
            with self._connection.cursor() as cursor:
                cursor.copy_expert(statement, self, CHUNK_BYTES)
                self._copied = cursor.rowcount
        except Exception as error:
            self._error = error
        finally:
            self._over.set()
