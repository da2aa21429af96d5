"""Journals that a crash, a disk or something else has damaged: what is sound is kept, the rest is told."""

from __future__ import annotations

import os
import select
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.journal import check as journal_check
from broker.journal import file as journal_file
from broker.journal.file import connect
from broker.journal.journals import Journals
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalDamagedError
from tests.harness.journals import (
    DEADLINE_S,
    INCARNATION,
    NAME,
    OTHER,
    OWN,
    START,
    chain,
    change_body,
    fill,
    flush,
    frame,
    opened,
    read_all,
    wait,
)


def crashed(source: Path, target: Path, frames: list[Frame], *, logged: int) -> None:
    """Make what a crash leaves: frames in the file and, at the end, some in the log alone."""
    fill(source, frames[: len(frames) - logged])
    with opened(source) as journals:
        for each in frames[len(frames) - logged :]:
            journals.accept(each)
            flush(journals)
        target.mkdir()
        for name in (NAME, NAME + "-wal"):
            shutil.copy(source / name, target / name)


def check_remainder(directory: Path, frames: list[Frame]) -> tuple[int, int]:
    """Open a damaged journal, check that what is left is a sound run, and return its bounds as indexes."""
    with opened(directory) as journals:
        head = journals.open(OWN, INCARNATION, START)
        first = journals.first(OWN)
        ends = [START, *(each.here for each in frames)]
        low, high = ends.index(first), ends.index(head.position)
        if journals.opened(OWN).lost:
            assert (low, high) == (0, 0)
            assert list(directory.glob("*.damaged-*"))
        kept = read_all(journals, first)
        assert kept == frames[low:high], "only what was accepted, without a hole"
        if (low, high) != (0, len(frames)):
            assert journals.notes or directory.joinpath("log-cut").exists()
        after = chain(3, start=head.position)
        assert [journals.accept(each) for each in after] == [Verdict.FITS] * 3
        flush(journals)
        assert read_all(journals, first) == kept + after
    with opened(directory) as journals:
        assert journals.opened(OWN).notes == ()
        assert read_all(journals, first) == kept + after
    return low, high


@pytest.mark.parametrize("cut", [1, 7, 100, 5000, 20_000])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_end_of_the_log_is_torn(tmp_path: Path, cut: int, zeros: bool) -> None:
    frames = chain(12, 3000)
    crashed(tmp_path / "source", tmp_path / "crashed", frames, logged=6)
    log = tmp_path / "crashed" / (NAME + "-wal")
    damage_end(log, cut, zeros)
    (tmp_path / "crashed" / "log-cut").touch()
    low, high = check_remainder(tmp_path / "crashed", frames)
    assert low == 0
    assert 6 <= high < 12


@pytest.mark.parametrize("cut", [1, 7, 100, 5000, 20_000])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_end_of_the_file_is_torn(tmp_path: Path, cut: int, zeros: bool) -> None:
    frames = chain(40, 9000)
    fill(tmp_path, frames)
    damage_end(tmp_path / NAME, cut, zeros)
    low, high = check_remainder(tmp_path, frames)
    assert high - low >= 30, "all but the few frames that the damage touched"


def damage_end(path: Path, count: int, zeros: bool) -> None:
    size = path.stat().st_size
    assert size > count
    os.truncate(path, size - count)
    if zeros:
        os.truncate(path, size)


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    frames = chain(30, 2500)
    fill(tmp_path / "source", frames)
    original = (tmp_path / "source" / NAME).read_bytes()
    outcomes = set()
    for number, offset in enumerate(range(13, len(original), len(original) // 60)):
        directory = tmp_path / str(number)
        directory.mkdir()
        damaged = bytearray(original)
        damaged[offset] ^= 0x20
        (directory / NAME).write_bytes(damaged)
        low, high = check_remainder(directory, frames)
        outcomes.add("all" if high - low == 30 else "none" if high == low else "some")
    assert "some" in outcomes


@pytest.mark.parametrize(("index", "low", "high"), [(19, 0, 19), (10, 11, 20), (0, 1, 20)])
def test_a_damaged_frame(tmp_path: Path, index: int, low: int, high: int) -> None:
    frames = chain(20)
    fill(tmp_path, frames)
    change_body(tmp_path / NAME, index)
    assert check_remainder(tmp_path, frames) == (low, high)


def test_a_missing_frame(tmp_path: Path) -> None:
    frames = chain(20)
    fill(tmp_path, frames)
    with sqlite3.connect(tmp_path / NAME) as connection:
        connection.execute("DELETE FROM frame WHERE id = 8")
    connection.close()
    assert check_remainder(tmp_path, frames) == (8, 20)


def test_damage_that_opening_does_not_see_is_seen_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = chain(20)
    fill(tmp_path, frames)
    change_body(tmp_path / NAME, 5)
    monkeypatch.setattr(journal_check, "TAIL_BYTES", 1000)
    with opened(tmp_path) as journals:
        assert journals.opened(OWN).notes == ()
        assert journals.read(OWN, START, 1 << 20) == frames[:5]
        with pytest.raises(JournalDamagedError, match="origin 1 is damaged after 0/96"):
            journals.read(OWN, frames[4].here, 1 << 20)
        assert journals.read(OWN, frames[5].here, 1 << 20) == frames[6:]
        flush(journals)
        journals.trim(OWN, frames[5].here)
        assert read_all(journals, frames[5].here) == frames[6:]


@pytest.mark.parametrize("content", [b"", b"no database " * 1000])
def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{NAME}.damaged-1").write_bytes(b"an older one")
    (tmp_path / NAME).write_bytes(content)
    with opened(tmp_path) as journals:
        assert OWN not in journals.chains()
        assert journals.opened(OWN).lost
        assert journals.open(OWN, INCARNATION, START) == ChainHead.at(OWN, INCARNATION, START)
        assert journals.opened(OWN).lost
        (aside,) = tmp_path.glob("*.damaged-*")
        assert aside.read_bytes() == content
        assert str(aside) in journals.notes[0]


def test_files_are_private(tmp_path: Path) -> None:
    with opened(tmp_path / "journal") as journals:
        journals.open(OWN, INCARNATION, START)
        journals.accept(chain(1)[0])
        flush(journals)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "journal").iterdir()} == {0o600}
        assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here ({mounted.stderr.decode().strip()})")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill_disk(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("origin", [OWN, OTHER])
def test_a_full_disk_is_survived_and_left_again(small_disk: Path, origin: int) -> None:
    with opened(small_disk / "journal") as journals:
        journals.open(origin, INCARNATION, START)
        frames = chain(60, 20_000, origin=origin)
        for each in frames[:10]:
            journals.accept(each)
        flush(journals, origin)
        ballast = small_disk / "ballast"
        fill_disk(ballast)
        for each in frames[10:]:
            assert journals.accept(each) is Verdict.FITS
        wait(journals, lambda: journals.failure is not None)
        assert "cannot be written" in str(journals.failure)
        assert journals.failure is not None
        assert journals.failure.recoverable
        durable = journals.durable(origin)
        assert durable < frames[-1].here
        for _ in range(3):
            select.select([journals.notify_fd], [], [], DEADLINE_S)
            journals.collect()
            assert journals.failure is not None
            assert journals.durable(origin) == durable, "it does not move while nothing can be written"
        assert read_all(journals, origin=origin) == frames, "every accepted frame is served all the same"
        ballast.unlink()
        flush(journals, origin)
        wait(journals, lambda: journals.failure is None)
        assert journals.pending_bytes == 0
        assert read_all(journals, origin=origin) == frames
    with opened(small_disk / "journal") as journals:
        assert read_all(journals, origin=origin) == frames


def test_a_journal_that_begins_on_a_full_disk(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with opened(small_disk / "journal") as journals:
        fill_disk(ballast)
        journals.open(OWN, INCARNATION, START)
        frames = chain(5)
        for each in frames:
            journals.accept(each)
        wait(journals, lambda: journals.failure is not None)
        assert journals.durable(OWN) == START
        ballast.unlink()
        flush(journals)
        assert read_all(journals) == frames


def test_a_failed_commit_is_written_again_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a group: the file goes back to its last known state and nothing is there twice."""
    parts = [frame(Position(110), Position(120, 1)), frame(Position(120, 1), Position(120, 2))]
    again = [frame(Position(110), Position(120, 1), attempt=2), frame(Position(120, 1), Position(120), attempt=2)]
    failing = [True]
    checkpoints: list[bool] = []
    real_connect = journal_file.connect
    real_checkpoint = journal_file.checkpoint

    class Failing(sqlite3.Connection):
        """Commits, then says that the sync failed: what a lost page in the cache looks like from here."""

        def execute(self, sql: str, *args: object) -> sqlite3.Cursor:
            cursor = super().execute(sql, *args)  # type: ignore[arg-type]
            if failing[0] and sql == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return cursor

    def connect_failing(path: Path, *, synchronous: str) -> sqlite3.Connection:
        if not failing[0]:
            return real_connect(path, synchronous=synchronous)
        return sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=Failing)

    def count_checkpoint(connection: sqlite3.Connection) -> None:
        checkpoints.append(True)
        real_checkpoint(connection)

    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in [frame(START, Position(110)), *parts]:
            journals.accept(each)
        flush(journals)
    with opened(tmp_path) as journals:
        flush(journals)
        monkeypatch.setattr(journal_file, "connect", connect_failing)
        monkeypatch.setattr(journal_file, "checkpoint", count_checkpoint)
        # The connection at hand is a sound one: have the writer open another.
        monkeypatch.setattr(journal_file, "append", _raise_once(journal_file.append))
        for each in again:
            journals.accept(each)
        for _ in range(3):
            wait(journals, lambda: journals.failure is not None)
        assert journals.durable(OWN) == Position(110)
        failing[0] = False
        flush(journals)
        wait(journals, lambda: journals.failure is None)
        assert checkpoints
        assert read_all(journals) == [frame(START, Position(110)), *again]
    with opened(tmp_path) as journals:
        assert read_all(journals) == [frame(START, Position(110)), *again]


def _raise_once(real: Callable[[sqlite3.Connection, Frame, float], None]) -> Callable[..., None]:
    raised: list[bool] = []

    def wrapped(connection: sqlite3.Connection, each: Frame, received: float) -> None:
        if not raised:
            raised.append(True)
            raise sqlite3.OperationalError("disk I/O error")
        real(connection, each, received)

    return wrapped


def test_a_file_taken_away_from_a_running_journal_is_an_error(tmp_path: Path) -> None:
    frames = chain(3)
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        journals.accept(frames[0])
        flush(journals)
        with connect(tmp_path / NAME, synchronous="OFF") as connection:
            connection.execute("DROP TABLE body")
        connection.close()
        journals.accept(frames[1])
        wait(journals, lambda: journals.failure is not None)
        assert journals.durable(OWN) == frames[0].here
        with pytest.raises(JournalDamagedError, match="origin 1"):
            journals.read(OWN, START, 1)


def test_the_writer_may_be_woken_later(tmp_path: Path) -> None:
    """Frames are read from memory meanwhile, and closing writes what nobody has woken the writer for."""
    later: list[Callable[[], None]] = []
    frames = chain(5)
    journals = Journals(tmp_path, OWN, soon=later.append)
    journals.start()
    journals.open(OWN, INCARNATION, START)
    for each in frames[:3]:
        assert journals.accept(each) is Verdict.FITS
    assert journals.read(OWN, START, 1 << 20) == frames[:3]
    assert len(later) == 1
    later.pop()()
    flush(journals)
    assert journals.durable(OWN) == frames[2].here
    for each in frames[3:]:
        journals.accept(each)
    assert len(later) == 1
    journals.close()
    with opened(tmp_path) as again:
        assert again.open(OWN, INCARNATION, START).position == frames[4].here
