"""Brokers alone, driven over their local sockets: frames reach the other node, whole, whatever is restarted."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.frames import Frame, read_frames
from pmgsync.core.positions import LAST, ZERO, Position
from pmgsync.errors import PmgsyncError, ResyncRequiredError
from tests.harness.broker_process import INCARNATION, Broker, Capture, frame, run_of
from tests.harness.cluster import eventually


class Apply:
    """Plays an apply worker."""

    def __init__(
        self, broker: Broker, *, incarnation: int = 0, position: Position = ZERO, credit: int = 1 << 24
    ) -> None:
        self.link = broker.link("apply:1")
        self.frames: list[Frame] = []

        def opened() -> object:
            try:
                return self.link.request(
                    {
                        "op": "apply.open",
                        "origin": 1,
                        "incarnation": incarnation,
                        "position": list(position),
                        "credit": credit,
                    }
                )[0]
            except ResyncRequiredError:
                raise
            except PmgsyncError:
                time.sleep(0.1)
                return None

        answer = eventually(opened, what="apply.opened")
        self.id = answer["id"]
        self.position = Position.parse(answer["position"])

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Say something now and then, as a worker does, while the test is busy elsewhere."""
        over = threading.Event()

        def talk() -> None:
            while not over.wait(0.3):
                self.link.send({"op": "report", "state": "A", "error": ""})

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def take(self, until: Position) -> list[Frame]:
        def reached() -> bool:
            while (received := self.link.receive(0.1)) is not None:
                message, parts = received
                assert message["op"] != "error", message
                if message["op"] == "frame":
                    self.frames.extend(read_frames(parts))
            self.link.send({"op": "report", "state": "A", "error": ""})
            return bool(self.frames) and self.frames[-1].here >= until

        eventually(reached, what=f"frames until {until}")
        return self.frames


def test_frames_arrive_live_and_after_every_kind_of_restart(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    frames = run_of(400, size=2000)
    capture = Capture(one)
    assert capture.position == Position(100)
    apply = Apply(two)
    assert apply.position == Position(100)
    capture.send(frames[:100])
    assert apply.take(frames[99].here) == frames[:100]
    capture.wait_durable(frames[99].here)

    two.kill()
    capture.send(frames[100:200])
    capture.wait_durable(frames[199].here)
    two.start()
    again = Apply(two, incarnation=INCARNATION, position=frames[49].here)
    assert again.take(frames[199].here) == frames[50:200]

    with again.kept():
        one.kill()
        one.start()
        capture = Capture(one)
    assert capture.position == frames[199].here
    capture.send(frames[200:])
    assert again.take(frames[-1].here) == frames[50:]


def test_a_restarted_broker_says_at_once_what_its_journal_has_and_confirms_it_once_it_is_synced(
    pair: tuple[Broker, Broker],
) -> None:
    one, _ = pair
    frames = run_of(3)
    capture = Capture(one)
    capture.send(frames)
    capture.link.send({"op": "watermark", "lsn": 500})
    capture.wait_durable(frames[-1].here, 500)
    one.kill(signal.SIGTERM)
    (path,) = (one.state_dir / "journal").glob("1-*.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        # As on a slow disk: the journal can be read, and its writer cannot sync it again yet.
        other.execute("BEGIN IMMEDIATE")
        one.start()
        capture = Capture(one)
        # With less than that the slot, confirmed up to there, would look as if the journal had lost its end.
        assert (capture.position, capture.watermark) == (frames[-1].here, 500)
        capture.hear()
        assert (capture.durable, capture.marked) == (Position(100), 0)
        other.execute("ROLLBACK")
    capture.wait_durable(frames[-1].here, 500)


def test_a_large_transaction_is_begun_again_after_a_crash(pair: tuple[Broker, Broker]) -> None:
    one, two = pair
    capture, apply = Capture(one), Apply(two)
    parts = [
        frame(Position(100), Position(200, 1), attempt=5),
        frame(Position(200, 1), Position(200, 2), attempt=5),
    ]
    capture.send(parts)
    assert apply.take(Position(200, 2)) == parts
    capture.wait_durable(Position(200, 2))
    with apply.kept():
        one.kill()
        one.start()
        capture = Capture(one)
    assert capture.position == Position(100), "what is half journaled is dropped"
    again = [
        frame(Position(100), Position(200, 1), attempt=6),
        frame(Position(200, 1), Position(200, LAST), attempt=6),
        frame(Position(200), Position(300), attempt=6),
    ]
    capture.send(again)
    assert apply.take(Position(300)) == parts + again


def test_a_stranger_and_a_removed_member_get_nothing(pair: tuple[Broker, Broker], tmp_path: Path) -> None:
    one, two = pair
    capture, apply = Capture(one), Apply(two)
    frames = run_of(20)
    capture.send(frames[:10])
    apply.take(frames[9].here)
    one.link("cli").request({"op": "member.delete", "cid": 2})
    eventually(lambda: _left(two), what="the removed member knows it")
    capture.send(frames[10:])
    capture.wait_durable(frames[-1].here)
    before = len(apply.frames)
    assert apply.link.receive(1.0) is None or len(apply.frames) == before


def _left(broker: Broker) -> bool:
    signed = StateDirectory(broker.state_dir).document()
    return signed is not None and signed.document.member(2) is None
