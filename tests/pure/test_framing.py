"""The framer: whatever the server sends, frames hold every kept transaction once, whole, in order, self-contained."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.emitted import SealKey
from pmgsync.core.frames import Frame, read_frame, unpack_body
from pmgsync.core.framing import LONE_SHARE, ChainName, Framer
from pmgsync.core.positions import Position
from pmgsync.errors import ProtocolError

CHAIN = ChainName(b"c" * 16, 1, 7, 99, 5)
KEY = SealKey(b"i" * 64, b"o" * 64)


def begin(lsn: int) -> bytes:
    return struct.pack(">cQQI", b"B", lsn, 1000, 7)


def commit(lsn: int) -> bytes:
    return struct.pack(">cBQQQ", b"C", 0, lsn, lsn + 8, 1000)


def relation(number: int, version: int) -> bytes:
    return b"R" + number.to_bytes(4, "big") + b"v%d" % version


def insert(number: int, marker: bytes) -> bytes:
    return b"I" + number.to_bytes(4, "big") + marker


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[bytes], list[tuple[int, list[tuple[bytes, bytes]]]]]:
    """Messages as a server sends them, and what must come out: (lsn, [(relation in force, change)])."""
    messages: list[bytes] = []
    expected: list[tuple[int, list[tuple[bytes, bytes]]]] = []
    sent: dict[int, int] = {}
    lsn = 0
    for _ in range(draw(st.integers(1, 8))):
        lsn += draw(st.integers(1, 50))
        changes: list[tuple[bytes, bytes]] = []
        messages.append(begin(lsn))
        foreign = draw(st.integers(0, 5)) == 0
        if foreign:
            messages.append(b"O" + bytes(8) + b"x\0")
        for _ in range(draw(st.integers(0, 6))):
            number = draw(st.integers(1, 3))
            if number not in sent or draw(st.integers(0, 3)) == 0:
                sent[number] = sent.get(number, 0) + 1
                messages.append(relation(number, sent[number]))
            change = insert(number, draw(st.binary(min_size=1, max_size=60)))
            messages.append(change)
            changes.append((relation(number, sent[number]), change))
        messages.append(commit(lsn))
        if changes and not foreign:
            expected.append((lsn, changes))
    return messages, expected


def read_back(frames: list[Frame]) -> list[tuple[int, list[tuple[bytes, bytes]]]]:
    out: list[tuple[int, list[tuple[bytes, bytes]]]] = []
    lsn = 0
    open_changes: list[tuple[bytes, bytes]] = []
    for frame in frames:
        described: dict[bytes, bytes] = {}
        for message in unpack_body(read_frame(frame.header_bytes, frame.body).body):
            kind, key = message[:1], message[1:5]
            if kind == b"B":
                lsn, open_changes = int.from_bytes(message[1:9], "big"), []
            elif kind == b"R":
                described[key] = message
            elif kind == b"C":
                out.append((lsn, open_changes))
            else:
                open_changes.append((described[key], message))
    return out


@given(histories(), st.integers(20, 400), st.data())
def test_every_transaction_once_and_self_contained(
    history: tuple[list[bytes], list[tuple[int, list[tuple[bytes, bytes]]]]], size: int, data: st.DataObject
) -> None:
    messages, expected = history
    framer = Framer(CHAIN, Position(0), key=KEY, frame_bytes=size, gap_s=0)
    frames: list[Frame] = []
    while messages:
        count = data.draw(st.integers(1, 12))
        frames += framer.feed(messages[:count])
        messages = messages[count:]
        if data.draw(st.integers(0, 4)) == 0 and (frame := framer.flush(0)):
            frames.append(frame)
    if frame := framer.flush(0):
        frames.append(frame)
    assert framer.empty
    assert read_back(frames) == expected
    assert sum(frame.header.changes for frame in frames) == sum(len(changes) for _, changes in expected)
    head = ChainHead.at(7, 99, Position(0))
    for frame in frames:
        assert head.judge(frame.header) is Verdict.FITS
        assert frame.prev == head.position
        head = head.advanced(frame.header)
    assert head.position.complete


@given(histories(), st.integers(20, 400), st.data())
def test_a_lone_transaction_goes_at_once_and_a_stream_in_company(
    history: tuple[list[bytes], list[tuple[int, list[tuple[bytes, bytes]]]]], size: int, data: st.DataObject
) -> None:
    """Messages arrive at any times; what may be closed is closed as soon as it may."""
    messages, expected = history
    gap = 1.0
    framer = Framer(CHAIN, Position(0), key=KEY, frame_bytes=size, gap_s=gap)
    sent: list[tuple[float, Frame, bool]] = []
    committed: dict[int, float] = {}
    now = 0.0

    def flush() -> None:
        if (frame := framer.flush(now)) is not None:
            sent.append((now, frame, False))

    for message in messages:
        arrives = now + data.draw(st.sampled_from([0.0, 0.0, 0.125, 0.5, 1.0, 4.0]))
        while (wait := framer.wait_s(now)) is not None and now + wait <= arrives:
            now += wait
            flush()
        now = arrives
        if message[:1] == b"C":
            committed[int.from_bytes(message[2:10], "big")] = now
        sent += [(now, frame, True) for frame in framer.feed([message])]
        flush()
    while (wait := framer.wait_s(now)) is not None:
        now += wait
        flush()
    assert framer.empty
    assert read_back([frame for _, frame, _ in sent]) == expected
    flushed = [(when, frame) for when, frame, full in sent if not full]
    for (earlier, frame), (later, _) in pairwise(flushed):
        lone = sum(message[:1] == b"B" for message in unpack_body(frame.body)) == 1
        assert later - earlier >= (gap / LONE_SHARE if lone else gap)
    for lsn, _ in expected:
        left = next(when for when, frame, _ in sent if frame.here >= Position(lsn))
        before = max((when for when, frame, full in sent if not full and frame.here < Position(lsn)), default=-gap)
        assert left <= max(committed[lsn], before + gap)


@given(histories(), st.integers(0, 200))
def test_what_the_journal_has_is_left_out(
    history: tuple[list[bytes], list[tuple[int, list[tuple[bytes, bytes]]]]], start: int
) -> None:
    messages, expected = history
    framer = Framer(CHAIN, Position(start), key=KEY)
    frames = list(framer.feed(messages))
    if frame := framer.flush(0):
        frames.append(frame)
    assert read_back(frames) == [entry for entry in expected if entry[0] > start]


@pytest.mark.parametrize(
    "messages",
    [
        [b"?"],
        [commit(5)],
        [insert(1, b"x")],
        [begin(5), insert(1, b"x")],
        [begin(5), begin(6)],
        [b"B"],
        [begin(5), relation(1, 1), insert(1, b"x"), b"O"],
    ],
)
def test_what_the_server_may_not_send(messages: list[bytes]) -> None:
    framer = Framer(CHAIN, Position(0), key=KEY)
    with pytest.raises(ProtocolError):
        list(framer.feed(messages))
