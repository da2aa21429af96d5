"""Messages on the local socket: whole however they are cut, bounded, and no harm to whoever gets nonsense."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.errors import ProtocolError, UnreachableError
from pmgsync.wire import local
from pmgsync.wire.local import MAX_BYTES, MAX_PARTS, LocalConnection, Splitter, head

SMALL = 64
SIZES = st.one_of(st.integers(0, 8), st.integers(SMALL - 16, SMALL + 4), st.integers(3 * SMALL, 4 * SMALL))
MESSAGES = st.lists(st.lists(SIZES, min_size=1, max_size=6), max_size=6)


def parts_of(sizes: list[int], seed: int) -> list[bytes]:
    return [bytes([(seed + n) % 251]) * size for n, size in enumerate(sizes)]


def encoded(parts: list[bytes]) -> bytes:
    return head([len(part) for part in parts]) + b"".join(parts)


@given(MESSAGES, st.lists(st.integers(1, 3 * SMALL), min_size=1, max_size=20))
def test_messages_are_whole_however_they_are_cut(shapes: list[list[int]], cuts: list[int]) -> None:
    messages = [parts_of(sizes, n) for n, sizes in enumerate(shapes)]
    stream = b"".join(map(encoded, messages))
    splitter, at, turn = Splitter(SMALL), 0, 0
    while at < len(stream):
        room = splitter.room
        assert len(room)
        count = min(len(room), cuts[turn % len(cuts)], len(stream) - at)
        room[:count] = stream[at : at + count]
        splitter.took(count)
        at, turn = at + count, turn + 1
    assert list(splitter.messages) == messages


@pytest.mark.parametrize("nonsense", [[0], [MAX_PARTS + 1], [1 << 31], [1, MAX_BYTES + 1], [2, 1 << 31, 1 << 31]])
def test_what_cannot_be_a_message_is_refused_before_anything_is_kept_for_it(nonsense: list[int]) -> None:
    data = struct.pack(f">{len(nonsense)}I", *nonsense)
    splitter = Splitter()
    splitter.room[: len(data)] = data
    with pytest.raises(ProtocolError, match="a local message"):
        splitter.took(len(data))


@pytest.fixture
def pair() -> Iterator[tuple[LocalConnection, LocalConnection]]:
    one, two = (LocalConnection(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield one, two
    one.close()
    two.close()


def test_what_the_kernel_does_not_take_at_once_follows_in_order(pair: tuple[LocalConnection, LocalConnection]) -> None:
    one, two = pair
    sent = [[b"%d" % n, bytes([n]) * (n * 50_000), b""] for n in range(40)]
    sent += [[b"x"] * MAX_PARTS, [memoryview(b"y" * 9_000_000)]]  # type: ignore[list-item]
    taken = [one.send(message) for message in sent]
    assert not all(taken)
    while not one.flush():
        two.receive()
    while len(two.messages) < len(sent):
        two.receive()
    assert list(two.messages) == [list(map(bytes, message)) for message in sent]


def test_whoever_reads_nothing_is_given_up_and_a_single_large_message_is_not(
    pair: tuple[LocalConnection, LocalConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_WAITING", 1 << 20)
    one, two = pair
    large = bytes(8 << 20)
    assert not one.send([large])
    for _ in range(4):  # those after it wait as long as without it
        assert not one.send([bytes(200 << 10)])
    with pytest.raises(UnreachableError, match="reads nothing"):
        for _ in range(4):
            one.send([bytes(200 << 10)])
    while not one.flush():
        two.receive()
    while not two.messages:
        two.receive()
    assert len(two.messages[0][0]) == len(large)
    for _ in range(3):  # the large one is forgotten
        one.send([bytes(600 << 10)])
    with pytest.raises(UnreachableError, match="reads nothing"):
        for _ in range(20):
            one.send([bytes(600 << 10)])


def test_send_all_waits_for_the_reader_and_not_for_ever(pair: tuple[LocalConnection, LocalConnection]) -> None:
    one, two = pair
    thread = threading.Thread(target=one.send_all, args=([bytes(4 << 20)], 60.0))
    thread.start()
    while not two.messages:
        two.receive()
    thread.join()
    with pytest.raises(UnreachableError, match="takes nothing"):
        one.send_all([bytes(4 << 20)], 0.05)


def test_an_end_is_told_after_what_came_before_it(pair: tuple[LocalConnection, LocalConnection]) -> None:
    one, two = pair
    one.send([b"last"])
    one.close()
    two.receive()
    assert two.messages.popleft() == [b"last"]
    with pytest.raises(UnreachableError, match="closed"):
        two.receive()
    with pytest.raises(UnreachableError, match="ended"):
        two.send([b"x"])
