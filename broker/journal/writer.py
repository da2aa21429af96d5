"""The journal's writer: a thread that owns all connections that write, so that the loop never waits for a disk.

Everything queued for a chain goes in with one commit. What failed stays queued, in order, and is tried again after a
pause; nothing is reported as done before its commit, and on the own chain its fsync, has succeeded.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from broker.journal import check as journal_check
from broker.journal import file as journal_file
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalError

RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 2.0


@dataclass(frozen=True, slots=True)
class Append:
    """Store a frame."""

    seq: int
    frame: Frame
    received: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Store the LSN up to which nothing more is to come than the frames before."""

    seq: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Delete every frame that ends after `upto`, and with `first` every one that ends at it or before."""

    seq: int
    upto: Position
    first: Position | None = None


@dataclass(frozen=True, slots=True)
class Begin:
    """Make the chain's file anew; closes the old one's reader too, because closing the last connection syncs."""

    seq: int
    start: Position
    reader: sqlite3.Connection | None


@dataclass(frozen=True, slots=True)
class End:
    """Remove the chain's file."""

    seq: int
    reader: sqlite3.Connection | None


Operation = Append | Mark | Keep | Begin | End


@dataclass
class _Work:
    """What there is to do for one file. `queue`, `trim_to` are shared with the loop; the rest is the thread's."""

    path: Path
    origin: int
    incarnation: int
    own: bool
    queue: deque[Operation] = field(default_factory=deque)
    trim_to: Position | None = None
    taken: list[Operation] = field(default_factory=list)
    connection: sqlite3.Connection | None = None
    done: Position | None = None
    trimming: Position | None = None
    vacuum: bool = False
    suspect: bool = False
    pause_s: float = 0.0
    retry_at: float = 0.0

    @property
    def waiting(self) -> bool:
        return bool(self.queue or self.taken or self.trim_to or self.trimming or self.vacuum)


@dataclass
class Report:
    """What the thread has done since the last report, by path: the newest operation done, and failures not yet over."""

    done: dict[Path, int]
    failures: dict[Path, JournalError]


class Writer:
    """The thread and its queues. `notify_fd` becomes readable when there is a new report."""

    def __init__(self) -> None:
        self.notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._condition = threading.Condition()
        self._works: dict[Path, _Work] = {}
        self._done: dict[Path, int] = {}
        self._failures: dict[Path, JournalError] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what is queued, once; then end the thread and close its connections."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self.notify_fd)

    def post(
        self, path: Path, origin: int, incarnation: int, own: bool, operation: Operation, *, wake: bool = True
    ) -> None:
        """Queue an operation; without `wake` the thread need not look before `wake` is called."""
        with self._condition:
            work = self._works.get(path)
            if work is None:
                work = self._works[path] = _Work(path, origin, incarnation, own)
            if isinstance(operation, Begin | End):
                # Nothing that came before matters any more, not even if it could never be written.
                for dropped in work.queue:
                    if isinstance(dropped, Begin | End) and dropped.reader is not None:
                        dropped.reader.close()
                work.queue.clear()
                work.trim_to = None
                work.retry_at = 0.0
            work.queue.append(operation)
            if wake:
                self._condition.notify()

    def wake(self) -> None:
        """Have the thread look at what is queued."""
        with self._condition:
            self._condition.notify()

    def trim(self, path: Path, upto: Position) -> None:
        """Forget frames that end at `upto` or before, which must be on disk: it may overtake what is queued."""
        with self._condition:
            work = self._works.get(path)
            if work is not None:
                work.trim_to = max(work.trim_to or upto, upto)
                self._condition.notify()

    def collect(self) -> Report:
        """Return what has been done and what fails, and make `notify_fd` unreadable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.notify_fd)
        with self._condition:
            report = Report(self._done, dict(self._failures))
            self._done = {}
        return report

    def _run(self) -> None:
        while True:
            with self._condition:
                works = self._ready()
                while not works and not self._closing:
                    self._condition.wait(self._pause())
                    works = self._ready()
                closing = self._closing
                if closing:
                    works = [work for work in self._sorted() if work.queue or work.taken]
            for work in works:
                self._process(work)
            if closing:
                break
        for work in self._works.values():
            self._close(work)

    def _sorted(self) -> list[_Work]:
        # The own chain first: capture waits for it.
        return sorted(self._works.values(), key=lambda work: not work.own)

    def _ready(self) -> list[_Work]:
        now = time.monotonic()
        return [work for work in self._sorted() if work.waiting and work.retry_at <= now]

    def _pause(self) -> float | None:
        waits = [work.retry_at for work in self._works.values() if work.waiting]
        return max(0.0, min(waits) - time.monotonic()) if waits else None

    def _process(self, work: _Work) -> None:
        with self._condition:
            fresh = list(work.queue)
            work.queue.clear()
            if work.trim_to is not None:
                work.trimming, work.trim_to = work.trim_to, None
        if fresh and isinstance(fresh[0], Begin | End):
            self._retire(work)
        work.taken += fresh
        try:
            self._apply(work)
        except Exception as error:  # a thread that died of the unexpected would look like a slow disk
            self._failed(work, error)
            return
        with self._condition:
            if work.taken:
                self._done[work.path] = work.taken[-1].seq
                ended = isinstance(work.taken[-1], End)
                work.taken = []
                if ended and not work.queue:
                    del self._works[work.path]
            if not work.suspect:
                work.pause_s = 0.0
                self._failures.pop(work.path, None)
        os.eventfd_write(self.notify_fd, 1)

    def _failed(self, work: _Work, error: Exception) -> None:
        # After an error nothing is known of the last transaction; what is on disk is found out on a new connection.
        self._close(work)
        work.suspect = True
        work.pause_s = min(RETRY_LONGEST_S, work.pause_s * 2 or RETRY_FIRST_S)
        work.retry_at = time.monotonic() + work.pause_s
        full = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        hint = f"free space or repair the file system of {work.path.parent}; writing goes on by itself"
        damaged = isinstance(error, sqlite3.Error) and not journal_file.environmental(error)
        if damaged:
            hint = "restart pmgsync-broker, which saves what is sound of the file"
            with suppress(OSError):
                journal_check.suspect_path(work.path).touch(mode=0o600)
        reason = "the disk is full" if full else error
        failure = JournalError(f"the journal of origin {work.origin} cannot be written ({reason})", hint=hint)
        failure.recoverable = not damaged
        failure.__cause__ = error
        with self._condition:
            self._failures[work.path] = failure
        os.eventfd_write(self.notify_fd, 1)

    def _close(self, work: _Work) -> None:
        if work.connection is not None:
            with suppress(sqlite3.Error):  # what the connection had not committed is still queued
                work.connection.close()
            work.connection = None

    def _retire(self, work: _Work) -> None:
        """Drop everything that was under way for a file that is now removed or made anew."""
        self._close(work)
        for operation in work.taken:
            if isinstance(operation, Begin | End) and operation.reader is not None:
                operation.reader.close()
        work.taken = []
        work.trimming = work.done = None
        work.suspect = work.vacuum = False
        work.pause_s = 0.0

    def _apply(self, work: _Work) -> None:
        operations = work.taken
        if operations and isinstance(operations[0], Begin | End):
            beginning, *operations = operations
            assert isinstance(beginning, Begin | End)
            self._close(work)
            if beginning.reader is not None:
                beginning.reader.close()
            journal_file.remove(work.path)
            if isinstance(beginning, End):
                return
            journal_file.create(work.path, work.origin, work.incarnation, beginning.start)
            work.done = beginning.start
        connection = work.connection or self._connect(work)
        self._shrink(work, connection)
        if not operations:
            return
        connection.execute("BEGIN IMMEDIATE")
        for operation in operations:
            match operation:
                case Append(_, frame, received):
                    journal_file.append(connection, frame, received)
                case Mark(_, lsn):
                    journal_file.set_mark(connection, lsn)
                case Keep(_, upto, first):
                    journal_file.delete_after(connection, upto)
                    if first is not None:
                        journal_file.set_first(connection, work.origin, work.incarnation, first)
                        while not journal_file.delete_upto(connection, first):
                            pass
        connection.execute("COMMIT")
        for operation in operations:
            match operation:
                case Append(_, frame, _):
                    work.done = frame.here
                case Keep(_, upto, _):
                    work.done = upto

    def _connect(self, work: _Work) -> sqlite3.Connection:
        """Return a connection to a file whose content is as durable as its chain asks for, up to `work.done`."""
        connection = journal_file.connect(work.path, synchronous="FULL" if work.own else "NORMAL")
        try:
            if work.own or work.suspect:
                # A predecessor may have died between write and fsync, and an fsync that failed once proves nothing
                # when it succeeds the second time: everything that is only in the log is written again.
                journal_file.checkpoint(connection)
            if work.done is not None:
                self._restore(work, connection, work.done)
        except BaseException:
            connection.close()
            raise
        work.connection = connection
        work.suspect = False
        return connection

    def _restore(self, work: _Work, connection: sqlite3.Connection, done: Position) -> None:
        """Bring the file back to the last state that is known to be on disk; what came after is still queued."""
        connection.execute("BEGIN IMMEDIATE")
        journal_file.delete_after(connection, done)
        newest = connection.execute("SELECT lsn, part FROM frame ORDER BY id DESC LIMIT 1").fetchone()
        first = journal_file.read_first(connection, work.origin, work.incarnation)
        begins_again = any(isinstance(operation, Keep) for operation in work.taken)
        if first < done and (newest is None or newest != done) and not begins_again:
            raise sqlite3.DatabaseError(f"the frame that ends at {done} was written and is gone")
        connection.execute("COMMIT")

    def _shrink(self, work: _Work, connection: sqlite3.Connection) -> None:
        """Forget a chunk of what is to be trimmed; the rest follows when the others had their turn."""
        if work.trimming is not None:
            connection.execute("BEGIN IMMEDIATE")
            # First the position, in the same transaction: a crash between chunks leaves frames that nobody asks for.
            first = journal_file.read_first(connection, work.origin, work.incarnation)
            if work.trimming > first:
                journal_file.set_first(connection, work.origin, work.incarnation, work.trimming)
            finished = journal_file.delete_upto(connection, work.trimming)
            connection.execute("COMMIT")
            if finished:
                work.trimming, work.vacuum = None, True
        elif work.vacuum:
            work.vacuum = journal_file.give_back(connection)
