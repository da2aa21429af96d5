"""One chain's SQLite file: its layout, and how frames go in and come out.

The table `frame` has a row for each frame, `body` its body in pieces (SQLite's longest value is shorter than a body may
be), `meta` one row with the chain's name and the position that the oldest frame follows. The ids of frames ascend with
their positions. Every function raises `sqlite3.Error`; the callers say what that means for the chain.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from pmgsync.core.frames import Frame, read_frame
from pmgsync.core.positions import Position
from pmgsync.errors import ProtocolError
from pmgsync.private_files import sync_directory

FORMAT = 1
SUFFIX = ".db"
PIECE_BYTES = 256 << 20
"""A body is stored in pieces of this size; SQLite is built for values of at most 10^9 bytes unless told otherwise."""
TRIM_FRAMES = 256
"""Frames that are forgotten in one transaction."""
SPARE_BYTES = 64 << 20
"""A file keeps this much unused space, and as much as it uses, before it is made smaller."""
_PIECE_BITS = 3
_PAGE_BYTES = 8192
_CACHE_KIB = 256
"""Of each connection, and there are two for each chain. Frames are written once and mostly read once: a larger cache
only fills up over hours."""
_WAL_BYTES = 16 << 20
_BUSY_S = 5.0

_SCHEMA = """
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, origin INTEGER NOT NULL,
    incarnation INTEGER NOT NULL, first_lsn INTEGER NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE frame (
    id INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, part INTEGER NOT NULL, prev_lsn INTEGER NOT NULL,
    prev_part INTEGER NOT NULL, attempt INTEGER NOT NULL, received REAL NOT NULL, size INTEGER NOT NULL,
    header BLOB NOT NULL
);
CREATE UNIQUE INDEX frame_position ON frame (lsn, part);
CREATE TABLE body (key INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE mark (id INTEGER PRIMARY KEY CHECK (id = 1), lsn INTEGER NOT NULL, checksum INTEGER NOT NULL);
"""
_ROW = "id, lsn, part, prev_lsn, prev_part, attempt, received, size"


_ENVIRONMENT = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
    }
)


def environmental(error: BaseException) -> bool:
    """True when an error is about the machine, not about the file's content: nothing may be thrown away then."""
    code: object = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, OSError) or (isinstance(code, int) and code & 0xFF in _ENVIRONMENT)


def file_name(origin: int, incarnation: int) -> str:
    """Return the name of a chain's file."""
    return f"{origin}-{incarnation:016x}{SUFFIX}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return origin and incarnation of a file's name, None when it is not a chain's."""
    origin, dash, incarnation = name.removesuffix(SUFFIX).partition("-")
    try:
        chain = int(origin), int(incarnation, 16)
    except ValueError:
        return None
    return chain if dash and file_name(*chain) == name else None


def connect(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """Return a connection to an existing file; transactions are begun and ended by the caller."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S
    )
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    return connection


def remove(path: Path) -> None:
    """Remove a file and what SQLite keeps beside it, the log first: it must never meet another file of that name."""
    for suffix in ("-wal", "-shm", ".new", ".new-wal", ".new-shm", ".suspect", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def create(path: Path, origin: int, incarnation: int, first: Position) -> None:
    """Make an empty file, on disk when this returns; under its name there is all of it or nothing."""
    new = path.with_name(path.name + ".new")
    create_as(new, origin, incarnation, first)
    new.replace(path)
    sync_directory(path.parent)


def create_as(path: Path, origin: int, incarnation: int, first: Position) -> None:
    """Make an empty file under a name that nobody looks for yet."""
    for suffix in ("-wal", "-shm", "-journal", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    # Made here so that it is private from its first instant; SQLite gives -wal and -shm the mode of the file.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(connect(path, synchronous="FULL")) as connection:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.executescript(_SCHEMA)
        connection.execute("PRAGMA journal_mode = WAL")
        set_first(connection, origin, incarnation, first)


def _meta_checksum(origin: int, incarnation: int, first: int) -> int:
    return zlib.crc32(f"{FORMAT} {origin} {incarnation} {first}".encode())


def set_first(connection: sqlite3.Connection, origin: int, incarnation: int, first: Position) -> None:
    """Write the position that the oldest frame follows."""
    assert first.complete
    values = (FORMAT, origin, incarnation, first.lsn, _meta_checksum(origin, incarnation, first.lsn))
    connection.execute("INSERT OR REPLACE INTO meta VALUES (1, ?, ?, ?, ?, ?)", values)


def set_mark(connection: sqlite3.Connection, lsn: int) -> None:
    """Write the origin's LSN up to which the frames here are known to be all that there is."""
    connection.execute("INSERT OR REPLACE INTO mark VALUES (1, ?, ?)", (lsn, _mark_checksum(lsn)))


def read_mark(connection: sqlite3.Connection) -> int:
    """Return that LSN, 0 when it was never written or is damaged: a mark that is too high would be silent loss."""
    row = connection.execute("SELECT lsn, checksum FROM mark").fetchone()
    return row[0] if row and row[1] == _mark_checksum(row[0]) else 0


def _mark_checksum(lsn: int) -> int:
    return zlib.crc32(f"mark {lsn}".encode())


def read_first(connection: sqlite3.Connection, origin: int, incarnation: int) -> Position:
    """Return the position that the oldest frame follows.

    Raises:
        sqlite3.DatabaseError: when it is damaged, or of another chain.
    """
    row = connection.execute("SELECT format, origin, incarnation, first_lsn, checksum FROM meta").fetchone()
    if row is None or row != (FORMAT, origin, incarnation, row[3], _meta_checksum(origin, incarnation, row[3])):
        raise sqlite3.DatabaseError("its meta row is damaged or names another chain")
    return Position(row[3])


class Row(NamedTuple):
    """What `frame` says of a frame beside its header."""

    id: int
    prev: Position
    here: Position
    attempt: int
    received: float
    size: int


def rows(connection: sqlite3.Connection, *, newest_first: bool = False) -> Iterator[Row]:
    """Yield the rows of all frames in the order of their ids."""
    order = "DESC" if newest_first else "ASC"
    for row in connection.execute(f"SELECT {_ROW} FROM frame ORDER BY id {order}"):
        yield _row(row)


def _row(row: tuple[int, int, int, int, int, int, float, int]) -> Row:
    key, lsn, part, prev_lsn, prev_part, attempt, received, size = row
    return Row(key, Position(prev_lsn, prev_part), Position(lsn, part), attempt, received, size)


def rows_between(connection: sqlite3.Connection, after: Position, upto: Position, max_bytes: int) -> list[Row]:
    """Return the rows of the frames with `after < here <= upto`, at least one if there is one, then up to a size."""
    found: list[Row] = []
    cursor = connection.execute(
        f"SELECT {_ROW} FROM frame WHERE (lsn, part) > (?, ?) AND (lsn, part) <= (?, ?) ORDER BY lsn, part",
        (*after, *upto),
    )
    with closing(cursor):
        for item in cursor:
            row = _row(item)
            if found and row.size > max_bytes:
                break
            found.append(row)
            max_bytes -= row.size
    return found


def load(connection: sqlite3.Connection, row: Row) -> Frame:
    """Return a row's frame, whose checksum holds.

    Raises:
        ProtocolError: when it is damaged, or not the frame that the row names.
    """
    header = connection.execute("SELECT header FROM frame WHERE id = ?", (row.id,)).fetchone()
    pieces = connection.execute(
        "SELECT data FROM body WHERE key >= ? AND key < ? ORDER BY key",
        (row.id << _PIECE_BITS, row.id + 1 << _PIECE_BITS),
    ).fetchall()
    if header is None or type(header[0]) is not bytes or not all(type(piece) is bytes for (piece,) in pieces):
        raise ProtocolError(f"the frame that ends at {row.here} is not stored as bytes")
    frame = read_frame(header[0], pieces[0][0] if len(pieces) == 1 else b"".join(piece for (piece,) in pieces))
    if (frame.prev, frame.here, frame.header.attempt, frame.size) != (row.prev, row.here, row.attempt, row.size):
        raise ProtocolError(f"the frame that ends at {row.here} is stored in another one's place")
    return frame


def append(connection: sqlite3.Connection, frame: Frame, received: float) -> None:
    """Store a frame behind all others; `received` is wall clock time in seconds."""
    header = frame.header
    cursor = connection.execute(
        "INSERT INTO frame (lsn, part, prev_lsn, prev_part, attempt, received, size, header) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*header.here, *header.prev, header.attempt, received, frame.size, frame.header_bytes),
    )
    assert cursor.lastrowid is not None
    view = memoryview(frame.body)
    for number, start in enumerate(range(0, len(view), PIECE_BYTES)):
        key = cursor.lastrowid << _PIECE_BITS | number
        connection.execute("INSERT INTO body VALUES (?, ?)", (key, view[start : start + PIECE_BYTES]))


def delete_after(connection: sqlite3.Connection, upto: Position) -> None:
    """Delete the frames that end after a position."""
    (lowest,) = connection.execute("SELECT min(id) FROM frame WHERE (lsn, part) > (?, ?)", upto).fetchone()
    if lowest is not None:
        connection.execute("DELETE FROM body WHERE key >= ?", (lowest << _PIECE_BITS,))
        connection.execute("DELETE FROM frame WHERE id >= ?", (lowest,))


def delete_upto(connection: sqlite3.Connection, upto: Position) -> bool:
    """Delete some of the frames that end at a position or before; return whether that was all."""
    found = connection.execute(
        "SELECT id FROM frame WHERE (lsn, part) <= (?, ?) ORDER BY lsn, part LIMIT ?", (*upto, TRIM_FRAMES)
    ).fetchall()
    if found:
        ((highest,),) = found[-1:]
        connection.execute("DELETE FROM body WHERE key < ?", (highest + 1 << _PIECE_BITS,))
        connection.execute("DELETE FROM frame WHERE id <= ?", (highest,))
    return len(found) < TRIM_FRAMES


def give_back(connection: sqlite3.Connection) -> bool:
    """Return some unused space to the file system; return whether there is more to return."""
    (unused,) = connection.execute("PRAGMA freelist_count").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    if unused * _PAGE_BYTES <= SPARE_BYTES or unused <= pages // 2:
        return False
    connection.execute("PRAGMA incremental_vacuum(1024)").fetchall()
    return True


def checkpoint(connection: sqlite3.Connection) -> None:
    """Copy the whole log into the file and sync both.

    This makes a file's content durable after its writer died or an fsync failed. A page that was cached but lost on its
    way to the disk looks clean, and only writing it again brings it to the disk.
    """
    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise sqlite3.OperationalError("another process reads the journal")
