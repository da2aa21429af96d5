"""Chains: who follows the verdicts holds each transaction once, in order, whole, whatever the network and capture do.

The model has one origin and two receivers. Capture may start again at any time, with other frame boundaries and other
part sizes, and the origin's journal may lose its newest frames in a crash. Frames reach the receivers any number of
times, in any order, from any attempt; gaps are filled from the origin's journal or from the other receiver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Header
from pmgsync.core.positions import LAST, ZERO, Position
from tests.harness.session import examples

ORIGIN, INCARNATION = 3, 77


@dataclass(frozen=True)
class Sent:
    """A frame: whole transactions by LSN, or one part (attempt, number, number of the last or 0) of a large one."""

    header: Header
    whole: tuple[int, ...] = ()
    part: tuple[int, int, bool] | None = None

    @property
    def here(self) -> Position:
        return self.header.here


def header(prev: Position, here: Position, attempt: int, *, incarnation: int = INCARNATION) -> Header:
    return Header(bytes(16), 1, ORIGIN, incarnation, prev, here, 0, attempt, 1)


@dataclass
class Origin:
    """The WAL, capture, and the origin's journal."""

    wal: Sequence[tuple[int, bool]]
    journal: list[Sent] = field(default_factory=list)
    attempt: int = 1
    part: int = 0

    @property
    def complete(self) -> Position:
        return next((sent.here for sent in reversed(self.journal) if sent.here.complete), ZERO)

    @property
    def finished(self) -> bool:
        return self.complete.lsn == self.wal[-1][0]

    def capture(self, transactions: int, last_part: bool) -> Sent:
        """Send the next frame: up to this many small transactions, or the next part of a large one."""
        complete = self.complete
        rest = [item for item in self.wal if item[0] > complete.lsn]
        lsn, large = rest[0]
        if not large:
            count = next((index for index, item in enumerate(rest) if item[1]), len(rest))
            whole = tuple(number for number, _ in rest[: min(count, transactions)])
            sent = Sent(header(complete, Position(whole[-1]), self.attempt), whole)
        else:
            prev = Position(lsn, self.part) if self.part else complete
            self.part += 1
            last = last_part and self.part > 1
            here = Position(lsn, LAST if last else self.part)
            sent = Sent(header(prev, here, self.attempt), part=(self.attempt, self.part, last))
            if last:
                self.part = 0
        self.journal.append(sent)
        return sent

    def restart(self, lose: int) -> None:
        """Capture starts again; a crash may have taken the journal's newest frames."""
        del self.journal[len(self.journal) - min(lose, len(self.journal)) :]
        while self.journal and not self.journal[-1].here.complete:
            self.journal.pop()
        self.attempt += 1
        self.part = 0


@dataclass
class Receiver:
    """Follows the verdicts to the letter and looks at nothing else."""

    wal: Sequence[tuple[int, bool]]
    head: ChainHead = field(default_factory=lambda: ChainHead.at(ORIGIN, INCARNATION, ZERO))
    journal: list[Sent] = field(default_factory=list)
    parts: list[tuple[int, int, bool]] = field(default_factory=list)
    applied: list[int] = field(default_factory=list)

    def receive(self, sent: Sent) -> Verdict:
        verdict = self.head.judge(sent.header)
        if verdict in {Verdict.BEGIN_AGAIN, Verdict.DROP_PARTS}:
            self.head = self.head.without_parts()
            self.parts.clear()
            while self.journal and self.journal[-1].here > self.head.position:
                self.journal.pop()
        if verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            self._take(sent)
        self.check()
        return verdict

    def _take(self, sent: Sent) -> None:
        complete = self.head.complete
        self.head = self.head.advanced(sent.header)
        self.journal.append(sent)
        self.applied += [lsn for lsn in sent.whole if lsn > complete.lsn]
        if sent.part is not None:
            self.parts.append(sent.part)
            attempt, _, last = sent.part
            assert {part[0] for part in self.parts} == {attempt}, "parts of two attempts"
            assert [part[1] for part in self.parts] == list(range(1, len(self.parts) + 1)), "a part is missing"
            if last:
                self.applied.append(sent.here.lsn)
                self.parts.clear()

    def check(self) -> None:
        assert self.applied == [lsn for lsn, _ in self.wal[: len(self.applied)]], "not a prefix of the chain"
        assert self.head.complete == (Position(self.applied[-1]) if self.applied else ZERO)
        assert self.head.position.complete == (not self.parts)
        assert [sent.here for sent in self.journal] == sorted({sent.here for sent in self.journal})

    def replay(self, journal: Sequence[Sent], limit: int | None = None) -> None:
        """Ask a journal for what follows, and again whenever a verdict says so; stop when it has nothing that fits."""
        for _ in range(4):
            stream = [sent for sent in journal if sent.here > self.head.position][:limit]
            again = False
            for sent in stream:
                verdict = self.receive(sent)
                again = verdict is Verdict.DROP_PARTS
                if verdict in {Verdict.GAP, Verdict.DROP_PARTS}:
                    break
            if not again:
                break


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_each_transaction_once_in_order_and_whole(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.booleans(), min_size=1, max_size=8), label="large")
    wal = [((index + 1) * 10, large) for index, large in enumerate(sizes)]
    origin = Origin(wal)
    receivers = [Receiver(wal), Receiver(wal)]
    published: list[Sent] = []

    for _ in range(data.draw(st.integers(0, 50), label="steps")):
        step = data.draw(st.sampled_from(["capture", "capture", "capture", "live", "late", "restart", "replay"]))
        receiver, other = data.draw(st.permutations(receivers))
        if step == "capture" and not origin.finished:
            sent = origin.capture(data.draw(st.integers(1, 4)), data.draw(st.booleans()))
            published.append(sent)
            for each in receivers:
                if data.draw(st.booleans()):
                    follow(each, sent, origin.journal if data.draw(st.booleans()) else [])
        elif step == "live" and published:
            follow(receiver, published[-1], origin.journal)
        elif step == "late" and published:
            follow(receiver, data.draw(st.sampled_from(published)), other.journal)
        elif step == "restart":
            origin.restart(data.draw(st.integers(0, 3)))
        elif step == "replay":
            receiver.replay(data.draw(st.sampled_from([origin.journal, other.journal])), data.draw(st.integers(1, 6)))

    origin.restart(0)
    while not origin.finished:
        origin.capture(data.draw(st.integers(1, 4)), data.draw(st.booleans()) or origin.part > 3)
    first, second = receivers
    first.replay(origin.journal)
    # The origin is gone: the survivor's journal is as good.
    second.replay(first.journal)
    for receiver in receivers:
        assert receiver.applied == [lsn for lsn, _ in wal]
        assert receiver.head == ChainHead.at(ORIGIN, INCARNATION, Position(wal[-1][0]))


def follow(receiver: Receiver, sent: Sent, journal: Sequence[Sent]) -> None:
    """Receive a frame and, when its verdict says so, a replay."""
    if receiver.receive(sent) in {Verdict.GAP, Verdict.DROP_PARTS}:
        receiver.replay(journal)


def test_a_frame_of_another_incarnation_is_never_taken() -> None:
    head = ChainHead.at(ORIGIN, INCARNATION, Position(10))
    assert head.judge(header(Position(10), Position(20), 1, incarnation=78)) is Verdict.OTHER_CHAIN


def test_a_position_inside_a_frame_fits() -> None:
    head = ChainHead.at(ORIGIN, INCARNATION, Position(15))
    assert head.judge(header(Position(10), Position(20), 1)) is Verdict.FITS


def test_an_attempt_is_not_continued_by_another() -> None:
    head = ChainHead.at(ORIGIN, INCARNATION, Position(10))
    head = head.advanced(header(Position(10), Position(20, 1), 1))
    assert head.judge(header(Position(20, 1), Position(20, 2), 2)) is Verdict.DROP_PARTS
    assert head.judge(header(Position(20, 1), Position(20), 2)) is Verdict.DROP_PARTS
    assert head.judge(header(Position(10), Position(20, 1), 2)) is Verdict.BEGIN_AGAIN
    assert head.judge(header(Position(20, 1), Position(20, 2), 1)) is Verdict.FITS
    assert head.without_parts() == ChainHead.at(ORIGIN, INCARNATION, Position(10))
