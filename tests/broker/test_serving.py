"""Calls that are answered in pieces: what is not taken is given up, and lets go of what it holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from pmgsync.agent import serving
from pmgsync.agent.serving import Piece, Servings
from pmgsync.wire.dealer import DealerPeer
from pmgsync.wire.waiting import Wakeup
from tests.harness.cluster import eventually

PIECE = 1 << 10
STALLED_S = 0.6


class Served:
    """A call, its receiver's end, and whether its pieces are still being made."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        ends = [self._context.socket(zmq.DEALER) for _ in range(2)]
        ends[0].bind("inproc://served")
        ends[1].connect("inproc://served")
        self._link, self.receiver = (DealerPeer(end, "the other end") for end in ends)
        self._wakeup = Wakeup()
        self.servings = Servings(self._wakeup)
        self.made = 0
        self.over = False

    def begin(self, credit: int) -> None:
        self.servings.begin({"op": "call", "id": 1, "credit": credit, "caller": 2}, self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        try:
            while True:
                self.made += 1
                yield {"kind": "rows"}, bytes(PIECE)
        finally:
            self.over = True

    def step(self) -> list[dict[str, Any]]:
        """Let the worker's loop go round once; returns what the receiver gets."""
        self.servings.send(self._link)
        return [message for message, _ in self.receiver.pending()]

    def close(self) -> None:
        self.servings.close()
        eventually(lambda: self.over, within_s=10, what="the thread ends")
        self._wakeup.close()
        self._context.destroy(linger=0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(serving, "STALLED_S", STALLED_S)
    made = Served()
    yield made
    made.close()


def test_a_call_whose_receiver_is_gone_is_given_up_and_lets_go(served: Served) -> None:
    served.begin(3 * PIECE)
    got: list[dict[str, Any]] = []
    while len(got) < 3:
        got += eventually(served.step, within_s=10, what="what there is credit for")
    begun = time.monotonic()
    last = eventually(served.step, within_s=10, what="its end")
    assert time.monotonic() - begun >= STALLED_S / 2
    assert [(message["op"], message["id"]) for message in last] == [("error", 1)]
    eventually(lambda: served.over, within_s=10, what="the pieces are closed")
    made = served.made
    assert not served.step()
    assert served.made == made


def test_a_slow_receiver_is_waited_for(served: Served) -> None:
    served.begin(PIECE)
    for _ in range(6):
        got = eventually(served.step, within_s=10, what="a piece")
        assert [message["op"] for message in got] == ["data"]
        time.sleep(STALLED_S / 5)  # the time that it takes is what is tested
        assert not served.step()
        assert served.servings.take(served.receiver, {"op": "credit", "id": 1, "bytes": PIECE}, lambda _: None)
