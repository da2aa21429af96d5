"""The journal of one chain, as the loop thread sees it: what is in memory, what is on disk, and what is on its way."""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from broker.journal import file as journal_file
from broker.journal.retention import Ledger
from pmgsync.core.chains import ChainHead
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalDamagedError, JournalError, ProtocolError, ResyncRequiredError

DAMAGE_SCAN_BYTES = 64 << 20
"""How many bytes are searched for the damaged frame on which a read has failed."""


@dataclass(slots=True)
class Queued:
    """An operation that the writer has not reported.

    Attributes:
        seq: its number.
        size: bytes of the frame that it writes.
        position: where the file ends once it is done, None when that is not known or not changed.
        mark: the watermark that is on disk then, 0 when it is not changed.
    """

    seq: int
    size: int
    position: Position | None
    mark: int = 0


@dataclass
class ChainJournal:
    """One chain.

    Attributes:
        first: the position that the oldest frame held follows.
        disk: up to here frames are read from the file; everything after it is in `tail`.
        durable: the newest position that this process knows to be on disk.
        mark: the newest watermark that this process knows to be on disk.
        noted: the newest watermark, on disk or on its way.
    """

    path: Path
    head: ChainHead
    first: Position
    disk: Position
    durable: Position
    ledger: Ledger
    reader: sqlite3.Connection | None = None
    mark: int = 0
    noted: int = 0
    tail: list[Frame] = field(default_factory=list)
    queued: deque[Queued] = field(default_factory=deque)

    def collect(self, done: int) -> int:
        """Take over what the writer has done, up to an operation's number; return the bytes that left memory."""
        released = 0
        while self.queued and self.queued[0].seq <= done:
            entry = self.queued.popleft()
            released += entry.size
            self.mark = max(self.mark, entry.mark)
            if entry.position is not None:
                self.disk = self.durable = entry.position
        del self.tail[: bisect_right(self.tail, self.disk, key=_end)]
        return released

    def without_parts(self) -> ChainHead:
        """Forget the parts of a half transaction in memory and return the head; the writer changes the file."""
        self.head = head = self.head.without_parts()
        self.disk = min(self.disk, head.position)
        self.durable = min(self.durable, head.position)
        del self.tail[bisect_right(self.tail, head.position, key=_end) :]
        for entry in reversed(self.queued):
            if entry.position is None:
                continue
            if entry.position <= head.position:
                break
            entry.position = None
        self.ledger.drop_parts()
        return head

    def trimmed(self, upto: Position) -> Position | None:
        """Forget the frames that end at a position or before it; only what is on disk, and whole transactions.

        Returns:
            The new first position, None when nothing is forgotten.
        """
        whole = min(complete(upto), self.head.complete, complete(self.durable))
        if whole <= self.first:
            return None
        self.first = whole
        self.ledger.trim(whole)
        return whole

    def read(self, after: Position, max_bytes: int) -> list[Frame]:
        """Return the frames that end after a position; see `Journals.read`."""
        if after < self.first:
            raise ResyncRequiredError(
                f"the journal of origin {self.head.origin} begins at {self.first}, after {after}",
                hint=f"the node that is at {after} resynchronises by itself, from a snapshot",
            )
        found: list[Frame] = []
        if after < self.disk:
            found = self._read_disk(after, max_bytes)
            max_bytes -= sum(frame.size for frame in found)
            if found[-1].here != self.disk:
                return found
            after = self.disk
        for frame in self.tail[bisect_right(self.tail, after, key=_end) :]:
            if found and frame.size > max_bytes:
                break
            found.append(frame)
            max_bytes -= frame.size
        return found

    def beyond_damage(self, after: Position) -> Position:
        """Return where the first unreadable frame on disk after a position ends; in doubt, where the last one ends."""
        if self.reader is not None:
            try:
                for row in journal_file.rows_between(self.reader, after, self.disk, DAMAGE_SCAN_BYTES):
                    try:
                        journal_file.load(self.reader, row)
                    except ProtocolError:
                        return row.here
            except (sqlite3.Error, TypeError, ValueError):
                return self.disk
        return self.disk

    def _read_disk(self, after: Position, max_bytes: int) -> list[Frame]:
        origin = self.head.origin
        found: list[Frame] = []
        try:
            if self.reader is None:
                self.reader = journal_file.connect(self.path, synchronous="FULL")
            listed = journal_file.rows_between(self.reader, after, self.disk, max_bytes)
            last: journal_file.Row | None = None
            for row in listed:
                if last is None or last.here.complete:
                    joined = row.prev <= (last.here if last else after)
                else:
                    joined = row.prev == last.here and row.attempt == last.attempt
                if not joined:
                    raise ProtocolError(f"frames are missing in front of {row.here}")
                found.append(journal_file.load(self.reader, row))
                last = row
            if not found:
                raise ProtocolError(f"frames are missing up to {self.disk}")
        except (ProtocolError, sqlite3.Error, TypeError, ValueError) as error:
            if not found:
                if journal_file.environmental(error):
                    raise JournalError(f"the journal of origin {origin} cannot be read ({error})") from error
                reason = error.message if isinstance(error, ProtocolError) else error
                raise JournalDamagedError(
                    f"the journal of origin {origin} is damaged after {after} ({reason})",
                    hint="the frames are fetched from another member, or the nodes that need them are resynchronised",
                ) from error
        return found


def complete(position: Position) -> Position:
    """Return the newest complete position at or before this one that needs no knowledge of the chain."""
    return position if position.complete else Position(position.lsn - 1)


def _end(frame: Frame) -> Position:
    return frame.here
