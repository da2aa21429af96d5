"""Frames: what was packed is read again, and damage of any kind is an error of ours, never a wrong frame."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.chains.streams import MESSAGE_BYTES, MESSAGE_FRAMES, messages
from pmgsync.core.frames import (
    Frame,
    Header,
    make_frame,
    messages_of,
    read_frame,
    read_frames,
    read_header,
    unpack_body,
    with_parts,
)
from pmgsync.core.positions import LAST, MAX_LSN, Position, format_lsn, parse_lsn
from pmgsync.errors import FrameDamagedError, ProtocolError

lsns = st.integers(0, MAX_LSN - 1)
numbers = st.integers(0, MAX_LSN)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    prev = Position(draw(lsns), LAST)
    here = Position(draw(st.integers(prev.lsn + 1, MAX_LSN)), draw(st.sampled_from([1, 2, LAST])))
    if draw(st.booleans()):
        prev = Position(here.lsn, draw(st.integers(1, 5)))
        here = Position(here.lsn, draw(st.sampled_from([prev.part + 1, LAST])))
    return Header(
        draw(st.binary(min_size=16, max_size=16)),
        draw(numbers),
        draw(st.integers(1, 2**31 - 1)),
        draw(numbers),
        prev,
        here,
        draw(numbers),
        draw(numbers),
        draw(numbers),
    )


@given(headers(), st.lists(st.binary(max_size=40), max_size=8))
def test_round_trip(header: Header, messages: list[bytes]) -> None:
    frame = make_frame(header, messages)
    again = read_frame(frame.header_bytes, frame.body)
    assert again == frame
    assert unpack_body(again.body) == messages


@given(headers(), st.lists(st.binary(max_size=40), max_size=4), st.data())
def test_a_flipped_bit_is_seen(header: Header, messages: list[bytes], data: st.DataObject) -> None:
    frame = make_frame(header, messages)
    whole = bytearray(frame.header_bytes + frame.body)
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    split = len(frame.header_bytes)
    with pytest.raises(ProtocolError):
        read_frame(bytes(whole[:split]), bytes(whole[split:]))


@given(headers(), st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.data())
def test_a_truncated_frame_is_seen(header: Header, messages: list[bytes], data: st.DataObject) -> None:
    frame = make_frame(header, messages)
    cut = data.draw(st.integers(0, len(frame.body) - 1))
    with pytest.raises(FrameDamagedError):
        read_frame(frame.header_bytes, frame.body[:cut])
    cut = data.draw(st.integers(0, len(frame.header_bytes) - 1))
    with pytest.raises(ProtocolError):
        read_frame(frame.header_bytes[:cut], frame.body)


@given(st.binary(max_size=600))
def test_garbage_is_an_error_of_ours(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_header(garbage)
    with pytest.raises(ProtocolError):
        unpack_body(b"\xc1" + garbage)


@given(numbers)
def test_lsn_text(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "/", "0", "g/1", "0/100000000", "-1/0", "80000000/0", "1/2/3"])
def test_bad_lsn_text(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_lsn(text)


@given(st.lists(st.tuples(numbers, st.integers(1, LAST)), min_size=2, max_size=2))
def test_positions_order_by_lsn_then_part(pair: list[tuple[int, int]]) -> None:
    left, right = (Position(*one) for one in pair)
    assert (left < right) == (pair[0] < pair[1])
    assert Position.parse(list(left)) == left


def frames_of(sizes: list[int]) -> list[Frame]:
    header = Header(b"c" * 16, 1, 1, 1, Position(1), Position(2), 0, 1, 1)
    body = make_frame(header, [b"x"]).body
    return [Frame(header, b"h%d" % number, body.ljust(size)) for number, size in enumerate(sizes)]


@given(st.lists(st.sampled_from([1, 500, 1000, 65_000, MESSAGE_BYTES - 10, MESSAGE_BYTES + 1]), max_size=1500))
def test_frames_that_wait_share_messages(sizes: list[int]) -> None:
    frames = frames_of(sizes)
    groups = list(messages(frames))
    assert [frame for group in groups for frame in group] == frames
    for group in groups:
        assert len(group) == 1 or sum(frame.size for frame in group) <= MESSAGE_BYTES
        assert 1 <= len(group) <= MESSAGE_FRAMES
    for one, other in itertools.pairwise(groups):
        full = len(one) == MESSAGE_FRAMES or sum(frame.size for frame in [*one, other[0]]) > MESSAGE_BYTES
        assert full, "a message that had room was sent"


@given(st.lists(st.tuples(headers(), st.binary(max_size=40)), min_size=1, max_size=5), st.data())
def test_several_frames_in_a_message(given_frames: list[tuple[Header, bytes]], data: st.DataObject) -> None:
    frames = [make_frame(header, [body]) for header, body in given_frames]
    parts = [part for frame in frames for part in (frame.header_bytes, frame.body)]
    assert list(read_frames(parts)) == frames
    damaged = data.draw(st.integers(0, len(frames) - 1))
    parts[2 * damaged + 1] += b"x"
    found: list[Frame] = []
    with pytest.raises(FrameDamagedError):
        found.extend(read_frames(parts))
    assert found == frames[:damaged], "what came before it is taken"
    for wrong in ([], parts[:-1]):
        with pytest.raises(ProtocolError):
            read_frames(wrong)


@st.composite
def streams(draw: st.DrawFn) -> list[Frame]:
    """Frames as they may come: of whole transactions, parts of several runs, some twice or missing."""
    frames: list[Frame] = []
    prev = Position(0)
    for lsn in range(1, draw(st.integers(1, 8))):
        parts = draw(st.integers(1, 4))
        attempt = draw(st.sampled_from([1, 1, 1, 2]))
        for part in range(1, parts + 1):
            here = Position(lsn, part if part < parts else LAST)
            changes = draw(st.integers(0, 9))
            frames.append(make_frame(Header(b"c" * 16, 1, 7, 99, prev, here, 0, attempt, changes), [b"x"]))
            prev = here
    for _ in range(draw(st.integers(0, 2)) if frames else 0):
        at, to = (draw(st.integers(0, len(frames))) for _ in range(2))
        frames[at:to] = draw(st.sampled_from([[], frames[at:to] * 2, frames[to:at]]))
    return frames


@given(streams(), st.integers(0, 30))
def test_parts_come_together_when_all_are_there(frames: list[Frame], most: int) -> None:
    found = list(with_parts(frames, most))
    assert [frame for some in found for frame in some] == frames
    at = 0
    for some in found:
        if len(some) > 1:
            assert some[0].prev.complete and some[-1].here.complete
            assert all(one.here == two.prev and not one.here.complete for one, two in itertools.pairwise(some))
            assert len({frame.header.attempt for frame in some}) == 1
            assert sum(frame.header.changes for frame in some) <= most
        elif some[0].prev.complete and not some[0].here.complete:
            # The first of parts by itself: they are not all there, or are too many.
            end = at + 1
            while end < len(frames) and frames[end - 1].here == frames[end].prev and not frames[end - 1].here.complete:
                end += 1
            rest = frames[at:end]
            assert (
                not rest[-1].here.complete
                or sum(frame.header.changes for frame in rest) > most
                or len({frame.header.attempt for frame in rest}) > 1
            )
        at += len(some)


def test_the_parts_of_a_transaction_hold_nothing_else() -> None:
    def parts(*bodies: list[bytes]) -> list[Frame]:
        places = [Position(0), *(Position(5, part) for part in range(1, len(bodies))), Position(5)]
        headers = [Header(b"c" * 16, 1, 7, 99, prev, here, 0, 1, 1) for prev, here in itertools.pairwise(places)]
        return [make_frame(header, body) for header, body in zip(headers, bodies, strict=True)]

    assert messages_of(parts([b"B", b"I"], [b"I"], [b"I", b"C"])) == [b"B", b"I", b"I", b"I", b"C"]
    assert messages_of(parts([b"I", b"", b"C", b"B"])) == [b"I", b"", b"C", b"B"], "one frame is not looked into"
    refused: list[list[list[bytes]]] = [
        [[b"B"], []], [[], []], [[b"B"], [b"C", b"I"]], [[b"B"], [b"B", b"C"]], [[b"B", b"C"], [b"C"]],
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(ProtocolError):
            messages_of(parts(*wrong))
