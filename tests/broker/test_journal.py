"""The journal on real files: what was called durable is there after any crash, and damage is never passed over."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.journal.file import SPARE_BYTES, file_name, set_first
from broker.journal.retention import MARK_BYTES
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.positions import LAST, ZERO, Position
from pmgsync.errors import JournalError, ResyncRequiredError
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
