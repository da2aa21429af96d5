"""Journals with frames in them, for tests."""

from __future__ import annotations

import select
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from broker.journal.file import file_name
from broker.journal.journals import MAX_PENDING, Journals
from pmgsync.core.chains import Verdict
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import Position

OWN, OTHER, INCARNATION = 1, 2, 0x1234


NAME = file_name(OWN, INCARNATION)


START = Position(100)


DEADLINE_S = 60.0


def frame(prev: Position, here: Position, size: int = 200, *, origin: int = OWN, attempt: int = 1) -> Frame:
    """Return a frame whose body is different for every position and attempt."""
    body = (f"{origin} {here} {attempt} ".encode() * (size // 8 + 1))[:size]
    return make_frame(Header(b"c" * 16, 1, origin, INCARNATION, prev, here, 0, attempt, 1), [body])


def chain(count: int, size: int = 200, *, origin: int = OWN, start: Position = START) -> list[Frame]:
    """Return frames of one transaction each, ten LSNs apart."""
    ends = [start, *(Position(start.lsn + 10 * number) for number in range(1, count + 1))]
    return [frame(prev, here, size, origin=origin) for prev, here in pairwise(ends)]


@contextmanager
def opened(directory: Path, own: int = OWN, *, max_pending: int = MAX_PENDING) -> Iterator[Journals]:
    journals = Journals(directory, own, max_pending=max_pending)
    journals.start()
    try:
        yield journals
    finally:
        journals.close()


def wait(journals: Journals, condition: Callable[[], bool]) -> None:
    """Collect until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    journals.collect()
    while not condition():
        assert time.monotonic() < deadline, f"the condition does not hold, failure: {journals.failure}"
        select.select([journals.notify_fd], [], [], 1.0)
        journals.collect()


def flush(journals: Journals, origin: int = OWN) -> None:
    wait(journals, lambda: journals.durable(origin) == journals.chains()[origin].position)


def fill(directory: Path, frames: list[Frame], origin: int = OWN) -> None:
    """Write a chain's journal and close it in good order."""
    with opened(directory) as journals:
        journals.open(origin, INCARNATION, START)
        for each in frames:
            assert journals.accept(each) is Verdict.FITS
        flush(journals, origin)


def read_all(journals: Journals, after: Position = START, max_bytes: int = 1 << 20, origin: int = OWN) -> list[Frame]:
    found: list[Frame] = []
    while more := journals.read(origin, after, max_bytes):
        found += more
        after = more[-1].here
    return found


def change_body(path: Path, index: int) -> None:
    """Change a byte of the frame with this index, behind SQLite's back."""
    with sqlite3.connect(path) as connection:
        key, body = connection.execute("SELECT key, data FROM body ORDER BY key LIMIT 1 OFFSET ?", (index,)).fetchone()
        connection.execute("UPDATE body SET data = ? WHERE key = ?", (body[:-1] + bytes([body[-1] ^ 1]), key))
    connection.close()
