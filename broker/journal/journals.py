"""The journal: the frames of every chain that this node holds, in memory until they are on disk, then in SQLite.

Called from the broker's loop thread, which never waits for a disk to sync: a frame is accepted into memory and queued
for the writer thread, and `collect` takes over what that thread has done. A frame is read from memory until it is
committed and from its file afterwards, so a reader sees every accepted frame, in order, at once.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from broker.journal.chain import ChainJournal, Queued
from broker.journal.file import file_name, parse_name
from broker.journal.opening import Opened, open_file
from broker.journal.retention import Held, Ledger
from broker.journal.writer import Append, Begin, End, Keep, Mark, Writer
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import (
    JournalError,
)

log = logging.getLogger(__name__)

MAX_PENDING = 64 << 20
"""Bytes that are accepted but not on disk: of the own chain, and as many of all others together."""


# Longer than a class should be: it is the whole interface of the journal, and all its methods work on one state.
class Journals:
    """The journals of all chains, one SQLite file each in one directory."""

    def __init__(
        self,
        directory: Path,
        own: int,
        *,
        max_pending: int = MAX_PENDING,
        soon: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Take over a directory.

        Args:
            directory: made when it does not exist.
            own: this node's CID; its chain is fsynced before it counts as durable, the others are committed only,
                because they can be fetched again.
            max_pending: bytes, as in MAX_PENDING; a single larger frame is accepted when nothing else is pending.
            soon: calls its argument a little later. The writer is woken by it, so that frames are sent before the
                writer's thread asks for the interpreter lock. None: the writer is woken at once.
        """
        self.directory = directory
        self.own = own
        self.max_pending = max_pending
        self.notes: list[str] = []
        self._chains: dict[int, ChainJournal] = {}
        self._heads: dict[int, ChainHead] = {}
        self._opened: dict[int, Opened] = {}
        self._removed: dict[Path, int] = {}
        self._pending = {True: 0, False: 0}
        self._failures: dict[Path, JournalError] = {}
        self._seq = 0
        self._soon = soon
        self._waking = False
        self._writer = Writer()

    @property
    def notify_fd(self) -> int:
        """Readable when `collect` has something to take over."""
        return self._writer.notify_fd

    @property
    def failure(self) -> JournalError | None:
        """A failure to write that is not over, None when there is none; the own chain's comes first."""
        own = self._chains.get(self.own)
        if own is not None and own.path in self._failures:
            return self._failures[own.path]
        return next(iter(self._failures.values()), None)

    @property
    def pending_bytes(self) -> int:
        """Bytes of headers and bodies that are accepted but not on disk."""
        return sum(self._pending.values())

    def start(self) -> None:
        """Start the writer and open the chains in the directory; when one origin has several files, the newest one.

        Raises:
            JournalError: when the directory cannot be used.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted(self._files(), key=lambda item: item[2].stat().st_mtime_ns)
        except OSError as error:
            raise JournalError(f"the journal directory {self.directory} cannot be used ({error.strerror})") from error
        self._writer.start()
        for origin, incarnation, path in {item[0]: item for item in found}.values():
            try:
                self._continue(origin, incarnation, path)
            except JournalError as error:
                if origin == self.own:
                    raise
                self.notes.append(str(error))  # its follower meets the same error when it opens the chain

    def close(self) -> None:
        """Write what is accepted, end the writer, close everything. What cannot be written now is not written."""
        for chain in self._chains.values():
            if chain.reader is not None:
                chain.reader.close()
        self._chains.clear()
        self._heads.clear()
        self._writer.close()

    def collect(self) -> None:
        """Take over what the writer has done: durable positions move, memory is released. Raises nothing."""
        report = self._writer.collect()
        self._failures = report.failures
        self._removed = {path: seq for path, seq in self._removed.items() if report.done.get(path, -1) < seq}
        for origin, chain in self._chains.items():
            self._pending[origin == self.own] -= chain.collect(report.done.get(chain.path, -1))

    def chains(self) -> Mapping[int, ChainHead]:
        """Return origin to head: the newest frame accepted, on disk or not."""
        return MappingProxyType(self._heads)

    def opened(self, origin: int) -> Opened:
        """Return how opening an origin's chain went."""
        return self._opened.get(origin, Opened())

    def open(self, origin: int, incarnation: int, start: Position) -> ChainHead:
        """Open a chain and return its head.

        What is held of this incarnation is continued; otherwise the chain begins, empty, at `start`, a complete
        position. Files of other incarnations of the origin are removed.

        Raises:
            JournalError: when a file is there and cannot be read now.
        """
        path = self._path(origin, incarnation)
        chain = self._chains.get(origin)
        if chain is None or chain.path != path:
            self._discard(origin)
            chain = self._continue(origin, incarnation, path) if path not in self._removed else None
            chain = chain or self._begin(origin, incarnation, start, None)
        for _, _, other in self._files(origin):
            if other != path:
                self._end(origin, other, None)
        return chain.head

    def reset(self, origin: int, incarnation: int, start: Position) -> ChainHead:
        """Drop what is held of an origin and begin at `start`, a complete position."""
        path = self._path(origin, incarnation)
        chain = self._chains.get(origin)
        reader = None
        if chain is not None and chain.path == path:
            reader = self._detach(origin)
        else:
            self._discard(origin)
        self._opened.pop(origin, None)
        return self._begin(origin, incarnation, start, reader).head

    def forget(self, origin: int) -> None:
        """Drop an origin's chain and its files."""
        self._discard(origin)
        self._opened.pop(origin, None)
        for _, _, path in self._files(origin):
            if path not in self._removed:
                self._end(origin, path, None)

    def first(self, origin: int) -> Position:
        """Return the position that the oldest frame held follows: where replay can begin."""
        return self._chain(origin).first

    def durable(self, origin: int) -> Position:
        """Return the newest position on disk: committed, and on the own chain fsynced by this process.

        It never goes back, except when the parts of a half transaction are dropped. It may be a part's position; only
        a complete one may be confirmed to anyone.
        """
        return self._chain(origin).durable

    def accept(self, frame: Frame) -> Verdict:
        """Judge a frame whose checksum was verified, and take it when it fits or begins a transaction again.

        Raises:
            JournalError: when too much is pending; the frame was not taken and is to be offered again.
        """
        header = frame.header
        chain = self._chains.get(header.origin)
        if chain is None:
            return Verdict.OTHER_CHAIN
        verdict = chain.head.judge(header)
        if verdict is Verdict.DROP_PARTS:
            self.drop_parts(header.origin)
        if verdict not in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            return verdict
        own = header.origin == self.own
        if self._pending[own] and self._pending[own] + frame.size > self.max_pending:
            cause = self.failure
            raise JournalError(
                f"the journal of origin {header.origin} is behind by {self._pending[own]} bytes",
                hint=str(cause) if cause else "it goes on when the disk has caught up",
            ) from cause
        if verdict is Verdict.BEGIN_AGAIN:
            self.drop_parts(header.origin)
        chain.head = self._heads[header.origin] = chain.head.advanced(header)
        chain.tail.append(frame)
        chain.ledger.add(header.here, frame.size, time.monotonic())
        seq = self._queue(chain, frame.size, header.here)
        self._pending[own] += frame.size
        # Wall clock: it is what survives a restart. `retention.WallAge` bounds what a jump of it can do.
        self._post(chain, Append(seq, frame, time.time()))
        return verdict

    def mark(self, origin: int, lsn: int) -> None:
        """Note that up to an LSN of the origin there is nothing more to come than what was accepted so far."""
        chain = self._chain(origin)
        chain.noted = max(chain.noted, lsn)
        self._post(chain, Mark(self._queue(chain, 0, None, lsn), lsn))

    def noted(self, origin: int) -> int:
        """Return the newest mark that is in the journal, on disk or on its way there, 0 when there is none."""
        return self._chain(origin).noted

    def marked(self, origin: int) -> int:
        """Return the newest mark on disk, 0 when there is none; everything below it is on disk too."""
        return self._chain(origin).mark

    def drop_parts(self, origin: int) -> ChainHead:
        """Drop the parts of a half transaction and return the head, a complete position."""
        chain = self._chain(origin)
        if chain.head.position.complete:
            return chain.head
        head = self._heads[origin] = chain.without_parts()
        self._post(chain, Keep(self._queue(chain, 0, head.position), head.position))
        return head

    def read(self, origin: int, after: Position, max_bytes: int) -> list[Frame]:
        """Return the frames that end after a position, in order; the first one follows the position or contains it.

        There is at least one frame when the journal has any, then as many as fit in `max_bytes` of headers and bodies.
        Frames before a damaged one are returned; the next call raises.

        Raises:
            ResyncRequiredError: when frames after that position were forgotten.
            JournalDamagedError: when the next frame is damaged or missing; names origin and position.
            JournalError: when the file cannot be read now.
        """
        return self._chain(origin).read(after, max_bytes)

    def trim(self, origin: int, upto: Position) -> None:
        """Forget the frames that end at a position or before it; only what is on disk, and whole transactions."""
        chain = self._chain(origin)
        whole = chain.trimmed(upto)
        if whole is not None:
            self._writer.trim(chain.path, whole)

    def pass_damage(self, origin: int, after: Position) -> Position:
        """Forget everything up to the first damaged transaction after a position, and that too; return the new `first`.

        From now on `read` says of these frames that they are forgotten, instead of failing on the damage again.
        """
        chain = self._chain(origin)
        beyond = chain.beyond_damage(after)
        self.trim(origin, Position(beyond.lsn))
        return chain.first

    def size(self, origin: int) -> int:
        """Return the bytes of headers and bodies held; after a trim, at most `retention.MARK_BYTES` too many."""
        return self._chain(origin).ledger.size

    def oldest_age_s(self, origin: int) -> float | None:
        """Return the seconds since the oldest frame held was received, None when there is none."""
        return self._chain(origin).ledger.oldest_age_s(time.monotonic())

    def held(self) -> dict[int, Held]:
        """Return what is held of every chain, as `retention.decide` wants it."""
        now = time.monotonic()
        return {
            origin: Held(chain.first, chain.head.complete, chain.ledger.marks(now))
            for origin, chain in self._chains.items()
        }

    def _chain(self, origin: int) -> ChainJournal:
        chain = self._chains.get(origin)
        if chain is None:
            raise JournalError(f"no chain of origin {origin} is held here")
        return chain

    def _path(self, origin: int, incarnation: int) -> Path:
        return self.directory / file_name(origin, incarnation)

    def _files(self, origin: int | None = None) -> list[tuple[int, int, Path]]:
        named = ((parse_name(path.name), path) for path in self.directory.iterdir())
        return [(*chain, path) for chain, path in named if chain and origin in {None, chain[0]}]

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _queue(self, chain: ChainJournal, size: int, position: Position | None, mark: int = 0) -> int:
        """Note an operation that the writer is about to get, and return its number; see `chain.Queued`."""
        chain.queued.append(Queued(self._next(), size, position, mark))
        return self._seq

    def _post(self, chain: ChainJournal, operation: Append | Mark | Keep | Begin) -> None:
        head = chain.head
        soon = None if isinstance(operation, Keep | Begin) else self._soon
        own = head.origin == self.own
        self._writer.post(chain.path, head.origin, head.incarnation, own, operation, wake=soon is None)
        if soon is not None and not self._waking:
            self._waking = True
            soon(self._wake_writer)

    def _wake_writer(self) -> None:
        self._waking = False
        self._writer.wake()

    def _begin(self, origin: int, incarnation: int, start: Position, reader: sqlite3.Connection | None) -> ChainJournal:
        """Begin a chain in an empty file, which the writer makes."""
        path = self._path(origin, incarnation)
        self._removed.pop(path, None)
        head = ChainHead.at(origin, incarnation, start)
        chain = self._chains[origin] = ChainJournal(path, head, start, start, start, Ledger())
        self._heads[origin] = head
        self._post(chain, Begin(self._queue(chain, 0, start), start, reader))
        return chain

    def _continue(self, origin: int, incarnation: int, path: Path) -> ChainJournal | None:
        """Open a chain's file; None when there is none, or nothing of it can be used.

        Raises:
            JournalError: when the machine is at fault, not the file: nothing is thrown away then.
        """
        sound, opened = open_file(origin, incarnation, path)
        if opened is not None:
            self._note(origin, opened)
        if sound is None:
            return None
        found, run = sound.found, sound.found.run
        # The own chain's file may have frames that are only in the page cache, from a process that died before its
        # fsync. They are durable once the writer has synced them again.
        durable = run.start if origin == self.own else run.head.position
        chain = ChainJournal(path, run.head, run.start, run.head.position, durable, run.ledger, sound.reader)
        self._chains[origin] = chain
        self._heads[origin] = run.head
        if found.notes:
            # The mark may cover frames that are cut off now. It is removed first, or a crash in between would leave it.
            self._post(chain, Mark(self._queue(chain, 0, None), 0))
        chain.noted = 0 if found.notes else found.mark
        # Like the frames, the mark in the file counts as on disk once the writer has synced it again.
        seq = self._queue(chain, 0, run.head.position, chain.noted)
        self._post(chain, Keep(seq, run.head.position, run.start if found.rewrite else None))
        return chain

    def _note(self, origin: int, opened: Opened) -> None:
        self._opened[origin] = opened
        self.notes += opened.notes
        for note in opened.notes:
            log.error("action=journal-damaged note=%s", note)

    def _detach(self, origin: int) -> sqlite3.Connection | None:
        """Forget an origin's chain here, not on disk, and return its reader."""
        chain = self._chains.pop(origin)
        del self._heads[origin]
        self._pending[origin == self.own] -= sum(entry.size for entry in chain.queued)
        return chain.reader

    def _discard(self, origin: int) -> None:
        chain = self._chains.get(origin)
        if chain is not None:
            self._end(origin, chain.path, self._detach(origin))

    def _end(self, origin: int, path: Path, reader: sqlite3.Connection | None) -> None:
        """Have a file removed. Until that is done, its name must not be opened."""
        self._removed[path] = self._next()
        self._writer.post(path, origin, 0, origin == self.own, End(self._seq, reader))
