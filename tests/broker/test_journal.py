"""The journal on real files: what was called durable is there after any crash, and damage is never passed over."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from broker.journal import check as journal_check
from broker.journal import file as journal_file
from broker.journal.file import SPARE_BYTES, connect, file_name, set_first
from broker.journal.journals import MAX_PENDING, Journals
from broker.journal.retention import MARK_BYTES
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import LAST, ZERO, Position
from pmgsync.errors import JournalDamagedError, JournalError, ResyncRequiredError

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


def test_reopening_continues(tmp_path: Path) -> None:
    frames = chain(20)
    fill(tmp_path, frames)
    with opened(tmp_path) as journals:
        assert journals.chains() == {OWN: ChainHead.at(OWN, INCARNATION, frames[-1].here)}
        assert journals.open(OWN, INCARNATION, ZERO) == journals.chains()[OWN]
        assert journals.first(OWN) == START
        assert read_all(journals) == frames
        assert journals.size(OWN) == sum(each.size for each in frames)
        age = journals.oldest_age_s(OWN)
        assert age is not None
        assert age >= 0
        assert journals.opened(OWN).notes == ()
        flush(journals)
        more = chain(5, start=frames[-1].here)
        assert [journals.accept(each) for each in more] == [Verdict.FITS] * 5
        assert read_all(journals) == frames + more


def test_the_own_chain_is_not_durable_before_it_was_synced_by_this_process(tmp_path: Path) -> None:
    frames = chain(3)
    fill(tmp_path, frames)
    with opened(tmp_path) as journals:
        assert journals.durable(OWN) == START, "nothing was collected yet"
        flush(journals)
        assert journals.durable(OWN) == frames[-1].here


def test_memory_and_disk_read_the_same(tmp_path: Path) -> None:
    frames = chain(50, 3000)
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in frames:
            journals.accept(each)
        for max_bytes in (1, 3000, 7000, 1 << 20):
            assert read_all(journals, max_bytes=max_bytes) == frames, "from memory"
        assert journals.pending_bytes == sum(each.size for each in frames)
        wait(journals, lambda: journals.durable(OWN) > START)
        assert read_all(journals) == frames, "from both"
        flush(journals)
        assert journals.pending_bytes == 0
        for max_bytes in (1, 3000, 7000, 1 << 20):
            assert read_all(journals, max_bytes=max_bytes) == frames, "from disk"
        # A position inside a frame, which is where a receiver stands after other frame boundaries.
        assert journals.read(OWN, Position(115), 1) == frames[1:2]
        assert journals.read(OWN, frames[-1].here, 1) == []
        assert journals.read(OWN, Position(10**9), 1) == []
        with pytest.raises(ResyncRequiredError, match="origin 1 begins at 0/64"):
            journals.read(OWN, Position(99), 1)


def test_verdicts(tmp_path: Path) -> None:
    frames = chain(3)
    with opened(tmp_path) as journals:
        assert journals.accept(frames[0]) is Verdict.OTHER_CHAIN
        journals.open(OWN, INCARNATION + 1, START)
        assert journals.accept(frames[0]) is Verdict.OTHER_CHAIN
        journals.open(OWN, INCARNATION, START)
        assert journals.accept(frames[1]) is Verdict.GAP
        assert journals.accept(frames[0]) is Verdict.FITS
        assert journals.accept(frames[0]) is Verdict.DUPLICATE
        wait(journals, lambda: [path.name for path in tmp_path.glob("*.db")] == [NAME])


@pytest.mark.parametrize("settled", [False, True])
def test_parts_of_two_attempts_are_never_mixed(tmp_path: Path, settled: bool) -> None:
    first = frame(START, Position(110))
    parts = [frame(Position(110), Position(120, 1)), frame(Position(120, 1), Position(120, 2))]
    again = [
        frame(Position(110), Position(120, 1), attempt=2),
        frame(Position(120, 1), Position(120, LAST), attempt=2),
    ]
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in [first, *parts]:
            assert journals.accept(each) is Verdict.FITS
        if settled:
            flush(journals)
            assert journals.durable(OWN) == Position(120, 2)
        assert read_all(journals) == [first, *parts]
        assert journals.accept(again[0]) is Verdict.BEGIN_AGAIN
        assert journals.durable(OWN) <= Position(110)
        assert read_all(journals) == [first, again[0]]
        assert journals.accept(frame(Position(120, 1), Position(120, 2), attempt=3)) is Verdict.DROP_PARTS
        assert journals.chains()[OWN] == ChainHead.at(OWN, INCARNATION, Position(110))
        assert read_all(journals) == [first]
        assert [journals.accept(each) for each in again] == [Verdict.FITS] * 2
        flush(journals)
        assert read_all(journals) == [first, *again]
        assert journals.size(OWN) == sum(each.size for each in [first, *again])
    with opened(tmp_path) as journals:
        assert read_all(journals) == [first, *again]


def test_a_half_transaction_survives_and_is_dropped_on_request(tmp_path: Path) -> None:
    frames = [frame(START, Position(110)), frame(Position(110), Position(120, 1))]
    fill(tmp_path, frames)
    with opened(tmp_path) as journals:
        head = journals.chains()[OWN]
        assert (head.position, head.complete, head.attempt) == (Position(120, 1), Position(110), 1)
        assert journals.drop_parts(OWN) == ChainHead.at(OWN, INCARNATION, Position(110))
        assert read_all(journals) == frames[:1]
    with opened(tmp_path) as journals:
        assert read_all(journals) == frames[:1]
        assert journals.chains()[OWN] == ChainHead.at(OWN, INCARNATION, Position(110))


def test_frames_that_overlap_are_kept(tmp_path: Path) -> None:
    # After a crash of the origin capture frames the same transactions anew, with other boundaries.
    frames = [frame(START, Position(110)), frame(START, Position(130), attempt=2), frame(Position(120), Position(140))]
    fill(tmp_path, frames)
    with opened(tmp_path) as journals:
        assert read_all(journals) == frames
        assert journals.read(OWN, Position(125), 1 << 20) == frames[1:]


def test_marks_are_as_durable_as_frames(tmp_path: Path) -> None:
    frames = chain(3)
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in frames:
            journals.accept(each)
        journals.mark(OWN, 500)
        wait(journals, lambda: journals.marked(OWN) == 500)
        assert journals.durable(OWN) == frames[-1].here
    with opened(tmp_path) as journals:
        assert journals.marked(OWN) == 0, "not synced by this process yet"
        wait(journals, lambda: journals.marked(OWN) == 500)
    change_body(tmp_path / NAME, 2)
    for _ in range(2):
        with opened(tmp_path) as journals:
            flush(journals)
            assert journals.durable(OWN) == frames[1].here
            assert journals.marked(OWN) == 0, "it spoke of a frame that was cut off"


def test_a_mark_among_parts_does_not_bring_them_back(tmp_path: Path) -> None:
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        flush(journals)
        journals.accept(frame(START, Position(110, 1)))
        journals.mark(OWN, 105)
        journals.accept(frame(Position(110, 1), Position(110, 2)))
        journals.mark(OWN, 106)
        journals.drop_parts(OWN)
        wait(journals, lambda: journals.marked(OWN) == 106)
        assert journals.durable(OWN) == START
        assert read_all(journals) == []


def test_reset_and_forget(tmp_path: Path) -> None:
    with opened(tmp_path) as journals:
        for origin in (OWN, OTHER):
            journals.open(origin, INCARNATION, START)
            for each in chain(10, origin=origin):
                journals.accept(each)
        flush(journals, OTHER)
        assert len(read_all(journals, origin=OTHER)) == 10
        assert journals.reset(OTHER, INCARNATION, Position(500)) == ChainHead.at(OTHER, INCARNATION, Position(500))
        assert journals.first(OTHER) == journals.durable(OTHER) == Position(500)
        assert journals.read(OTHER, Position(500), 1) == []
        later = chain(3, origin=OTHER, start=Position(500))
        assert [journals.accept(each) for each in later] == [Verdict.FITS] * 3
        flush(journals, OTHER)
        assert read_all(journals, Position(500), origin=OTHER) == later
        journals.forget(OWN)
        assert OWN not in journals.chains()
        with pytest.raises(JournalError, match="no chain of origin 1"):
            journals.first(OWN)
        # Opened again before or after the writer removed the file: it is empty.
        journals.open(OWN, INCARNATION, Position(7))
        flush(journals)
        assert journals.size(OWN) == 0
        assert journals.oldest_age_s(OWN) is None
    with opened(tmp_path) as journals:
        assert journals.chains()[OWN].position == Position(7)
        assert read_all(journals, Position(500), origin=OTHER) == later


def test_an_incarnation_replaces_the_one_before(tmp_path: Path) -> None:
    fill(tmp_path, chain(5))
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION + 1, Position(40))
        assert journals.first(OWN) == Position(40)
        wait(journals, lambda: [path.name for path in tmp_path.glob("*.db")] == [file_name(OWN, INCARNATION + 1)])
    with opened(tmp_path) as journals:
        assert journals.chains()[OWN].incarnation == INCARNATION + 1


def test_trimming(tmp_path: Path) -> None:
    frames = chain(1000, 100)
    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in frames:
            journals.accept(each)
        journals.trim(OWN, frames[-1].here)
        assert journals.first(OWN) == START, "what is not on disk is not forgotten"
        flush(journals)
        journals.trim(OWN, Position(frames[699].here.lsn + 5))
        assert journals.first(OWN) == Position(frames[699].here.lsn + 5)
        assert read_all(journals, journals.first(OWN)) == frames[700:]
        with pytest.raises(ResyncRequiredError):
            journals.read(OWN, frames[698].here, 1)
        wait(journals, lambda: stored(tmp_path) == 300)
        assert sum(each.size for each in frames[700:]) <= journals.size(OWN)
        assert journals.size(OWN) <= sum(each.size for each in frames[700:]) + MARK_BYTES
        journals.trim(OWN, frames[10].here)
        assert journals.first(OWN) == Position(frames[699].here.lsn + 5), "it never goes back"
    with opened(tmp_path) as journals:
        assert journals.first(OWN) == Position(frames[699].here.lsn + 5)
        assert read_all(journals, journals.first(OWN)) == frames[700:]
        flush(journals)
        journals.trim(OWN, frames[-1].here)
        assert journals.size(OWN) == 0
        wait(journals, lambda: stored(tmp_path) == 0)
        assert journals.accept(chain(1, start=frames[-1].here)[0]) is Verdict.FITS


def stored(directory: Path) -> int:
    connection = sqlite3.connect(directory / NAME)
    try:
        (count,) = connection.execute("SELECT count(*) FROM frame").fetchone()
    finally:
        connection.close()
    assert isinstance(count, int)
    return count


def test_trimming_gives_space_back(tmp_path: Path) -> None:
    frames = chain(SPARE_BYTES // 500_000 * 2, 500_000)
    with opened(tmp_path, max_pending=1 << 30) as journals:
        journals.open(OWN, INCARNATION, START)
        for each in frames:
            journals.accept(each)
        flush(journals)
        journals.trim(OWN, frames[-2].here)
        wait_for_size = SPARE_BYTES + (8 << 20)
        deadline = time.monotonic() + DEADLINE_S
        # Checkpoints shrink the file behind the transactions; nothing notifies of them.
        while (tmp_path / NAME).stat().st_size > wait_for_size:
            assert time.monotonic() < deadline
            journals.accept(chain(1, start=journals.chains()[OWN].position)[0])
            flush(journals)


def test_a_trim_that_a_crash_interrupted_is_finished(tmp_path: Path) -> None:
    frames = chain(10)
    fill(tmp_path, frames)
    connection = sqlite3.connect(tmp_path / NAME)
    with connection:
        set_first(connection, OWN, INCARNATION, frames[3].here)
    connection.close()
    with opened(tmp_path) as journals:
        assert journals.first(OWN) == frames[3].here
        assert journals.opened(OWN).notes == ()
        flush(journals)
        assert stored(tmp_path) == 6


def test_too_much_pending_is_refused_and_not_taken(tmp_path: Path) -> None:
    frames = chain(3, 1000)
    with opened(tmp_path, max_pending=1500) as journals:
        journals.open(OWN, INCARNATION, START)
        journals.open(OTHER, INCARNATION, START)
        assert journals.accept(frames[0]) is Verdict.FITS
        with pytest.raises(JournalError) as caught:
            journals.accept(frames[1])
        assert caught.value.recoverable
        assert journals.chains()[OWN].position == frames[0].here
        assert journals.accept(chain(1, origin=OTHER)[0]) is Verdict.FITS, "others have a share of their own"
        flush(journals)
        assert journals.accept(frames[1]) is Verdict.FITS


def test_a_body_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.journal.file.PIECE_BYTES", 1000)
    frames = [
        frame(START, Position(110), 6500),
        frame(Position(110), Position(120), 1),
        *chain(1, 1000, start=Position(120)),
    ]
    fill(tmp_path, frames)
    with opened(tmp_path) as journals:
        assert read_all(journals) == frames


WRITER = """
import os, select, sys
from pathlib import Path
from tests.broker.test_journal import INCARNATION, OWN, START, frame
from broker.journal.journals import Journals
from pmgsync.core.positions import Position
journals = Journals(Path(sys.argv[1]), OWN)
journals.start()
here = journals.open(OWN, INCARNATION, START).position
while True:
    for _ in range(20):
        prev, here = here, Position(here.lsn + 10)
        journals.accept(frame(prev, here, 5000))
    select.select([journals.notify_fd], [], [], 1.0)
    journals.collect()
    os.write(1, b"%d\\n" % journals.durable(OWN).lsn)
"""


def test_kill_minus_nine(tmp_path: Path) -> None:
    reached = START.lsn
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(15):
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split(b"\n")
        said = max([said, *(int(line) for line in rest[:-1])])
        process.wait()
        process.stdout.close()
        assert said > reached
        with opened(tmp_path) as journals:
            assert journals.notes == []
            reached = journals.chains()[OWN].position.lsn
            assert reached >= said, "what was called durable is there"
            assert [each.here.lsn for each in read_all(journals)] == list(range(110, reached + 1, 10))


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


def change_body(path: Path, index: int) -> None:
    """Change a byte of the frame with this index, behind SQLite's back."""
    with sqlite3.connect(path) as connection:
        key, body = connection.execute("SELECT key, data FROM body ORDER BY key LIMIT 1 OFFSET ?", (index,)).fetchone()
        connection.execute("UPDATE body SET data = ? WHERE key = ?", (body[:-1] + bytes([body[-1] ^ 1]), key))
    connection.close()


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
