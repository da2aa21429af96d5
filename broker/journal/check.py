"""The check of a chain's file when it is opened: which frames are sound, and what to do about the rest.

The newest run of frames without a hole is kept. A damaged end is cut off. When a chain is damaged in the middle, the
frames behind the damage stay, and receivers that need earlier ones are told to resynchronise. All of it is noted.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from broker.journal import file as journal_file
from broker.journal.file import Row
from broker.journal.retention import Ledger, WallAge
from pmgsync.core.chains import ChainHead
from pmgsync.core.positions import Position
from pmgsync.errors import JournalDamagedError, ProtocolError
from pmgsync.private_files import sync_directory

QUICK_CHECK_BYTES = 256 << 20
"""When a file up to this size is opened, every page is checked; of a larger one only those that are read."""
TAIL_BYTES = 16 << 20
"""How much of a chain's end is read and compared with its checksums when a file is opened."""


@dataclass
class Run:
    """Frames without a hole: they follow `start`, and `head` is where they end."""

    start: Position
    head: ChainHead
    count: int = 0
    lowest: int = 0
    highest: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    def follows(self, row: Row) -> bool:
        """True when a frame continues the run."""
        position = self.head.position
        if position.complete:
            return row.prev <= position < row.here
        return row.prev == position and row.attempt == self.head.attempt and row.here.lsn == position.lsn

    def add(self, row: Row, stamp: float) -> None:
        if row.here.complete:
            self.head = ChainHead.at(self.head.origin, self.head.incarnation, row.here)
        else:
            self.head = ChainHead(self.head.origin, self.head.incarnation, row.here, self.head.complete, row.attempt)
        self.lowest = self.lowest or row.id
        self.highest = row.id
        self.count += 1
        self.ledger.add(row.here, row.size, stamp)

    def without_parts(self) -> None:
        self.head = self.head.without_parts()
        self.ledger.drop_parts()


@dataclass
class Inspection:
    """What is sound of a file: everything after `run.start` up to `run.head`; the rest must be deleted.

    Attributes:
        notes: sentences about what was not sound.
        rewrite: True when frames outside the run are in the file.
        mark: what `journal_file.read_mark` returns; valid only when there are no notes.
    """

    run: Run
    notes: list[str]
    rewrite: bool
    mark: int


def inspect(connection: sqlite3.Connection, origin: int, incarnation: int) -> Inspection:
    """Check a file's structure, the chain's continuity and the checksums at its end, and return what is sound.

    Raises:
        sqlite3.DatabaseError: when SQLite cannot read it, or its rows are out of order.
    """
    _check_structure(connection)
    first = journal_file.read_first(connection, origin, incarnation)
    verify_from, found = 0, 0
    for row in journal_file.rows(connection, newest_first=True):
        verify_from, found = row.id, found + row.size
        if found >= TAIL_BYTES:
            break
    survey = _Survey(connection, origin, incarnation, first)
    survey.take(journal_file.rows(connection), verify_from)
    if survey.notes:
        # Where there is damage there may be more: now every frame is compared with its checksum.
        survey = _Survey(connection, origin, incarnation, first)
        survey.take(journal_file.rows(connection), 0)
    if survey.disordered:
        raise sqlite3.DatabaseError("its frames are out of order")
    run = survey.choose()
    return Inspection(run, survey.notes, bool(survey.notes) or survey.residue, journal_file.read_mark(connection))


def _check_structure(connection: sqlite3.Connection) -> None:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    if pages * page_bytes <= QUICK_CHECK_BYTES:
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if result != "ok":
            raise sqlite3.DatabaseError(result)
    # Frames are looked up and deleted by the index: one wrong entry in it could delete the whole chain.
    by_index = connection.execute("SELECT lsn, part, id FROM frame INDEXED BY frame_position ORDER BY lsn, part")
    by_id = connection.execute("SELECT lsn, part, id FROM frame NOT INDEXED ORDER BY id")
    if any(entry != row for entry, row in zip_longest(by_index, by_id)):
        raise sqlite3.DatabaseError("its index does not agree with its frames")


def suspect_path(path: Path) -> Path:
    """Return the name of the file by which a writer marks damage: the next opening makes the chain's file again."""
    return path.with_name(path.name + ".suspect")


class _Survey:
    """Sorts the rows of a file into runs."""

    def __init__(self, connection: sqlite3.Connection, origin: int, incarnation: int, first: Position | None) -> None:
        self.connection = connection
        self.origin, self.incarnation = origin, incarnation
        self.first = first
        self.runs: list[Run] = []
        self.notes: list[str] = []
        self.disordered = self.residue = False
        self._open = False
        self._age = WallAge()
        if first is not None:
            self._begin(first)

    def take(self, items: Iterable[Row], verify_from: int) -> None:
        last: Row | None = None
        for row in items:
            stamp = self._age.step(row.received)
            self.disordered = self.disordered or (last is not None and row.here <= last.here)
            last = row
            if self.first is not None and row.here <= self.first:
                self.residue = True  # of trimming that a crash interrupted
                continue
            problem = self._problem(row) if row.id >= verify_from else None
            if problem is not None:
                self._note(f"the frame that ends at {row.here} is damaged ({problem})")
                self._open = False
                continue
            if self._open and not self.runs[-1].follows(row):
                self._note(f"frames are missing between {self.runs[-1].head.position} and {row.prev}")
                self._open = False
            if not self._open:
                if not row.prev.complete:
                    continue  # the middle of a transaction whose beginning is gone
                self._begin(row.prev)
            self.runs[-1].add(row, stamp)
        self._age.step(time.time())

    def _begin(self, start: Position) -> None:
        self.runs.append(Run(start, ChainHead.at(self.origin, self.incarnation, start)))
        self._open = True

    def _problem(self, row: Row) -> str | None:
        try:
            journal_file.load(self.connection, row)
        except ProtocolError as error:
            return error.message
        except (sqlite3.Error, TypeError, ValueError) as error:
            if journal_file.environmental(error):
                raise
            return str(error)
        return None

    def _note(self, text: str) -> None:
        if len(self.notes) < 20:
            self.notes.append(f"journal of origin {self.origin}: {text}")

    def choose(self) -> Run:
        """Return the newest run that holds a whole transaction; `first` tells whoever needs older ones.

        Raises:
            sqlite3.DatabaseError: when there is no frame left of a file that had some.
        """
        whole = [run for run in self.runs if run.head.complete > run.start]
        if not self.runs:
            raise sqlite3.DatabaseError("none of its frames is sound")
        run = (whole or self.runs)[-1]
        if self.notes:
            run.without_parts()
            self._note(f"what is kept follows {run.start} and ends at {run.head.position}")
        run.ledger.shift(time.monotonic() - self._age.now)
        return run


def salvage(path: Path, origin: int, incarnation: int) -> list[str]:
    """Replace a file that SQLite calls malformed by a new one with the frames that are sound, and return notes.

    The one case in which opening a journal waits for the disk. The old file is set aside.

    Raises:
        sqlite3.Error, JournalDamagedError: when nothing can be saved.
    """
    new = path.with_name(path.name + ".new")
    _extend(path)
    with closing(journal_file.connect(path, synchronous="FULL")) as old:
        found = _readable(journal_file.rows(old, newest_first=True))[::-1] or _readable(journal_file.rows(old))
        survey = _Survey(old, origin, incarnation, None)
        survey.take(found, 0)
        run = survey.choose()
        run.without_parts()
        if not run.count:
            raise JournalDamagedError(f"nothing in the journal of origin {origin} is sound")
        journal_file.create_as(new, origin, incarnation, run.start)
        with closing(journal_file.connect(new, synchronous="FULL")) as copy:
            copy.execute("BEGIN")
            done = 0
            for row in found:
                if run.lowest <= row.id <= run.highest and row.here <= run.head.position:
                    journal_file.append(copy, journal_file.load(old, row), row.received)
                    done += row.size
                if done >= TAIL_BYTES:
                    copy.execute("COMMIT")
                    copy.execute("BEGIN")
                    done = 0
            copy.execute("COMMIT")
            journal_file.checkpoint(copy)
    set_aside(path)
    new.replace(path)
    sync_directory(path.parent)
    suspect_path(path).unlink(missing_ok=True)
    return [
        *survey.notes,
        f"journal of origin {origin}: the file was malformed, made anew from {run.start} to {run.head.position}",
    ]


def _extend(path: Path) -> None:
    """Give a torn file the length that its header names: SQLite refuses a shorter one as a whole."""
    with path.open("r+b") as file:
        header = file.read(100)
        if len(header) == 100:
            length = int.from_bytes(header[16:18], "big") * int.from_bytes(header[28:32], "big")
            if path.stat().st_size < length <= path.stat().st_size + TAIL_BYTES:
                file.truncate(length)


def _readable(items: Iterator[Row]) -> list[Row]:
    found: list[Row] = []
    try:
        for row in items:
            found.append(row)  # noqa: PERF402 - what came before the error counts
    except (sqlite3.Error, TypeError, ValueError) as error:
        if journal_file.environmental(error):
            raise
        # The rest of the file is what the caller reports as lost.
    return found


def set_aside(path: Path) -> Path:
    """Rename an unreadable file, so that an administrator can look at it; only the newest of them is kept."""
    for older in path.parent.glob(f"{path.name}.damaged-*"):
        older.unlink(missing_ok=True)
    target = path.with_name(f"{path.name}.damaged-{int(time.time())}")
    log = path.with_name(path.name + "-wal")
    if log.exists():
        log.replace(target.with_name(target.name + "-wal"))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    suspect_path(path).unlink(missing_ok=True)
    path.replace(target)
    return target
