"""Streams over a real journal: a receiver gets every frame after its position in order, however slow it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from broker.chains.streams import Stream, Streams
from pmgsync.core.chains import Verdict
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from tests.harness.journals import INCARNATION, OWN, START, frame, opened


def test_a_transaction_begun_again_does_not_move_a_stream_that_is_still_before_it(tmp_path: Path) -> None:
    whole = [
        frame(START, Position(200, 1)),
        frame(Position(200, 1), Position(200, 2)),
        frame(Position(200, 2), Position(200)),
    ]
    begun, again = (frame(Position(200), Position(300, 1), attempt=attempt) for attempt in (1, 2))
    received: list[Frame] = []

    def take(frames: Sequence[Frame]) -> bool:
        received.extend(frames)
        return True

    with opened(tmp_path) as journals:
        journals.open(OWN, INCARNATION, START)
        streams = Streams(journals, lambda *_: None)
        streams.open("receiver", 1, Stream(OWN, START, whole[0].size, True, take, lambda *_: None))
        for each in [*whole, begun]:
            assert journals.accept(each) is Verdict.FITS
            streams.offer(each)
        assert received == whole[:1], "as far as the credit goes: into the first transaction"
        assert journals.accept(again) is Verdict.BEGIN_AGAIN
        streams.fall_back(OWN, journals.chains()[OWN].complete)
        streams.offer(again)
        streams.add_credit("receiver", 1, 1 << 20)
    assert received == [*whole, again]
