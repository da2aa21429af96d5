"""Ceilings: whatever a master hands out within the allowance, a node that is promoted goes on behind it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.ceilings import (
    MIN_MARGIN,
    SHARE,
    Ceiling,
    Ceilings,
    Sequence,
    Value,
    look,
    margin,
    pack_values,
    unpack_values,
)
from pmgsync.core.changes import transactions
from pmgsync.core.emitted import SealKey
from pmgsync.core.frames import unpack_body
from pmgsync.core.framing import Framer
from pmgsync.core.pgoutput import Emitted
from pmgsync.core.positions import Position
from pmgsync.errors import ProtocolError
from tests.pure.test_framing import CHAIN, KEY, begin, commit

BIG = 2**63 - 1


@st.composite
def new_sequences(draw: st.DrawFn, *, cycle: bool | None = None) -> Sequence:
    """Sequences that were not used yet, of any direction and bounds."""
    increment = draw(st.sampled_from([1, 1, 1, 2, 7, 1000])) * draw(st.sampled_from([1, 1, -1]))
    low = draw(st.integers(-BIG, BIG - 1) | st.just(1))
    high = draw(st.integers(low + 1, BIG) | st.just(min(BIG, low + 40_000)) | st.just(BIG))
    cycles = draw(st.booleans()) if cycle is None else cycle
    return Sequence(increment, low, high, cycles, (low if increment > 0 else high) - increment)


def use(sequence: Sequence, count: int) -> tuple[Sequence, range | list[int]]:
    """Hand out up to `count` values, one by one in meaning; what a server would do."""
    count = count if sequence.cycle else min(count, sequence.room)
    if count == 0:
        return sequence, []
    last = sequence.ahead(count)
    used = replace(sequence, last=last)
    if count <= sequence.room:
        return used, range(sequence.last + sequence.increment, last + sequence.increment, sequence.increment)
    return used, []


@given(new_sequences(cycle=False), st.lists(st.floats(0, 1), max_size=40))
def test_no_value_handed_out_is_beyond_the_ceiling(sequence: Sequence, shares: list[float]) -> None:
    ceiling, publish, exact = look(Ceiling(), sequence)
    assert publish
    assert not exact
    copy = ceiling.value
    assert copy is not None
    for share in shares:
        sequence, handed_out = use(sequence, int(share * ceiling.allowance))
        # Promoted at this instant, the copy goes on behind every value.
        direction = 1 if sequence.increment > 0 else -1
        assert all(direction * (copy - value) >= 0 for value in handed_out[-1:])
        ceiling, publish, exact = look(ceiling, sequence)
        assert not exact
        if publish:
            assert ceiling.value is not None
            assert direction * (ceiling.value - copy) >= 0  # forward only
            copy = ceiling.value
        assert ceiling.value == copy


@given(new_sequences(), st.lists(st.integers(0, 50_000), max_size=40))
def test_the_allowance_is_what_is_promised(sequence: Sequence, uses: list[int]) -> None:
    ceiling, _, _ = look(Ceiling(), sequence)
    for count in uses:
        sequence, _ = use(sequence, count)
        ceiling, _, _ = look(ceiling, sequence)
        promised = min(MIN_MARGIN // 2, sequence.size // SHARE // 2)
        at_end = not sequence.cycle and ceiling.value == sequence.ahead(sequence.size)
        assert at_end or ceiling.allowance >= promised
        if sequence.size > 10_000_000 and not sequence.cycle and not at_end:
            assert ceiling.allowance >= 4 * min(count, sequence.room)
        assert ceiling.value is not None
        assert sequence.minimum <= ceiling.value <= sequence.maximum


@given(new_sequences(cycle=True), st.lists(st.floats(0, 1), max_size=60))
def test_one_that_cycles_stays_ahead_around_the_corner(sequence: Sequence, shares: list[float]) -> None:
    ceiling, _, exact = look(Ceiling(), sequence)
    assert exact
    for share in shares:
        count = int(share * ceiling.allowance) % sequence.size
        sequence, _ = use(sequence, count)
        assert ceiling.value is not None
        met_after = replace(sequence, last=ceiling.value).used_since(sequence.last)
        assert met_after is not None
        assert met_after % sequence.size == (ceiling.allowance - count) % sequence.size
        ceiling, publish, exact = look(ceiling, sequence)
        assert exact or not publish


def test_consumption_that_grows_widens_the_margin_and_a_quiet_time_narrows_it() -> None:
    sequence = Sequence(1, 1, BIG, False, 0)
    ceiling, _, _ = look(Ceiling(), sequence)
    sequence, _ = use(sequence, 100_000)
    ceiling, publish, _ = look(ceiling, sequence)
    assert publish
    assert ceiling.allowance == 800_000
    for _ in range(500):
        ceiling, publish, _ = look(ceiling, sequence)
        assert not publish
    assert margin(sequence, ceiling.recent) == MIN_MARGIN


def test_one_that_nobody_uses_is_published_once() -> None:
    ceilings, name = Ceilings(), (b"public", b"s")
    sequence = Sequence(1, 1, BIG, False, 0)
    assert ceilings.look({name: sequence}) == [Value(b"public", b"s", MIN_MARGIN, False)]
    assert ceilings.look({name: sequence}) == []
    ceilings.repeat()
    assert ceilings.look({name: sequence}) == [Value(b"public", b"s", MIN_MARGIN, False)]
    assert ceilings.look({name: sequence}) == []
    ceilings.forget()
    assert len(ceilings.look({name: sequence})) == 1


def test_one_that_is_set_back_is_followed_back() -> None:
    ceilings, name = Ceilings(), (b"public", b"s")
    ceilings.look({name: Sequence(1, 1, BIG, False, 5000)})
    assert ceilings.look({name: Sequence(1, 1, BIG, False, 0)}) == [Value(*name, MIN_MARGIN, True)]


def test_a_small_one_is_not_used_up_by_its_margin() -> None:
    assert margin(Sequence(1, 1, 32767, False, 0), 10**6) == 2047
    assert margin(Sequence(1, 1, 2, False, 0), 0) == 1


def test_at_its_end_it_is_left_alone() -> None:
    sequence = Sequence(1, 1, 100, False, 98)
    ceiling, publish, _ = look(Ceiling(), sequence)
    assert (publish, ceiling.value) == (True, 100)
    for last in (99, 100, 100):
        ceiling, publish, _ = look(ceiling, Sequence(1, 1, 100, False, last))
        assert (publish, ceiling.value) == (False, 100)


names = st.binary(min_size=1, max_size=63).filter(lambda name: b"\0" not in name)


@given(st.lists(st.builds(Value, names, names, st.integers(-BIG - 1, BIG), st.booleans())))
def test_a_message_is_read_as_it_was_written(values: list[Value]) -> None:
    assert unpack_values(pack_values(values)) == values


@given(st.binary(max_size=80))
def test_anything_else_is_refused(content: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack_values(content)


@pytest.mark.parametrize("content", [b"", b"\x91\x01", b"\x91\x94\xc4\x01a\xc4\x01b\xc3\xc3", b"\x80"])
def test_these_are_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_values(content)


def test_a_later_version_may_say_more() -> None:
    longer = pack_values([Value(b"s", b"n", 1, False)]).replace(b"\x94", b"\x95") + b"\x01"
    assert unpack_values(longer) == [Value(b"s", b"n", 1, False)]


# -- how a message travels ---------------------------------------------------------------------------------------------


def emitted(prefix: bytes, content: bytes, flags: int = 1, key: SealKey = KEY) -> bytes:
    content = key.seal(prefix, content) + content
    return b"M" + bytes([flags]) + bytes(8) + prefix + b"\0" + len(content).to_bytes(4, "big") + content


def test_only_our_transactional_messages_make_a_frame() -> None:
    framer = Framer(CHAIN, Position(0), key=KEY)
    for message in (
        *(begin(5), emitted(b"pmgsync", b"barrier"), commit(5)),
        *(begin(6), emitted(b"other.pmgsync.", b"x"), commit(6)),
        emitted(b"pmgsync.sequence", b"x", flags=0),
        *(begin(7), emitted(b"pmgsync.sequence", b"one"), emitted(b"pmgsync.later", b"two"), commit(7)),
        *(begin(8), emitted(b"pmgsync.sequence", b"forged", key=SealKey(b"i" * 64, b"x" * 64)), commit(8)),
    ):
        assert not list(framer.feed([message]))
    assert framer.forged == 1
    frame = framer.flush(0)
    assert frame is not None
    assert (frame.here, frame.header.changes, framer.empty) == (Position(7), 2, True)
    (piece,) = transactions(unpack_body(frame.body))
    assert piece.changes == [Emitted(b"pmgsync.sequence", b"one"), Emitted(b"pmgsync.later", b"two")]
