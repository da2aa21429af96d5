"""Brokers under fault, real processes: whatever links, peers and signals do, every transaction arrives once, in order.

`make soak` runs what takes longer; PMGSYNC_ROUNDS multiplies its rounds, PMGSYNC_SEED fixes the seed.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import Position
from tests.harness.brokers import (
    CLUSTER,
    INCARNATION,
    START,
    FaultyBroker,
    Receiver,
    document_of,
    make_frames,
    make_transactions,
    message_of,
    until,
)
from tests.harness.cluster import eventually
from tests.harness.fake_member import FakeMember, Habits
from tests.harness.played import ROUNDS, alerts_of, new_rng

pytestmark = pytest.mark.cluster


@pytest.fixture
def played(tmp_path: Path) -> Iterator[tuple[FakeMember, FaultyBroker]]:
    """Node 1 played by the test, node 2 a real broker."""
    with playing(tmp_path) as (fakes, broker):
        yield fakes[0], broker


@contextlib.contextmanager
def playing(directory: Path, count: int = 1) -> Iterator[tuple[list[FakeMember], FaultyBroker]]:
    """Members 1 to `count` played by the test, and one real broker, the last member."""
    fakes = [FakeMember(directory, f"fake{cid}", cid) for cid in range(1, count + 1)]
    broker = FaultyBroker(directory, "real")
    try:
        member = replace(broker.member(), cid=count + 1)
        document = None
        for fake in fakes:
            fake.start([member])
        keeper = FaultyBroker(directory, "fake1")
        keeper.ports = fakes[0].ports
        document = document_of([keeper], *(fake.member() for fake in fakes[1:]), broker.member())
        keeper.close()
        StateDirectory(broker.state_dir).store_document(document)
        broker.start()
        yield fakes, broker
    finally:
        broker.close()
        for fake in fakes:
            fake.close()


# -- a member that does everything wrong ------------------------------------------------------------------------------


class Mischief:
    """Publishes a chain with faults, and serves it with faults, as chance says."""

    def __init__(self, fake: FakeMember, rng: random.Random) -> None:
        self._fake, self._rng = fake, rng
        self._held_back: list[Frame] = []
        self.done: dict[str, int] = {}
        ways = ["well", "well", "well", "error", "end", "elsewhere", "greedy", "damaged"]
        self._left = 8
        fake.habits = Habits(serve=lambda _: self._choose(ways))

    def _choose(self, ways: list[str]) -> str:
        self._left -= 1
        way = self._rng.choice(ways) if self._left >= 0 else "well"
        self._count(f"replay {way}")
        return way

    def _count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    def send(self, frame: Frame) -> None:
        """Publish a frame, or something else."""
        fake, rng = self._fake, self._rng
        fake.keep(frame)
        header, body = frame.header_bytes, frame.body
        faults = ["none"] * 8 + [
            "dropped", "twice", "late", "body bit", "header bit", "cut body", "cut header", "long header", "long body",
            "version", "cluster", "origin", "incarnation", "heartbeat garbage", "heartbeat version", "heartbeat other",
            "long heartbeat", "topic",
        ]  # fmt: skip
        fault = rng.choice(faults)
        self._count(fault)
        here = frame.header
        match fault:
            case "none":
                fake.publish(header, body)
            case "dropped":
                pass
            case "twice":
                fake.publish(header, body)
                fake.publish(header, body)
            case "late":
                self._held_back.append(frame)
            case "body bit" | "header bit":
                broken = bytearray(body if fault == "body bit" else header)
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
                fake.publish(*((header, bytes(broken)) if fault == "body bit" else (bytes(broken), body)))
            case "cut body":
                fake.publish(header, body[: rng.randrange(len(body))])
            case "cut header":
                fake.publish(header[: rng.randrange(len(header))], body)
            case "long header":
                fake.publish(header + bytes(1000), body)
            case "long body":
                fake.publish(header, body + bytes(2 << 20))
            case "long heartbeat":
                fake.event(b"h", bytes(300 << 10))
            case "version":
                fake.publish(header[:1] + b"\x02" + header[2:], body)
            case "cluster" | "origin" | "incarnation":
                change: dict[str, Any] = {"cluster": bytes(16), "origin": 2, "incarnation": INCARNATION + 1}
                other = make_frame(replace(here, **{fault: change[fault]}), [b"not yours"])
                fake.publish(other.header_bytes, other.body)
            case "heartbeat garbage":
                fake.event(b"h", rng.randbytes(rng.randrange(200)))
            case "heartbeat version":
                fake.event(b"h", fake.heartbeat().pack().replace(b"\xa1v\x01", b"\xa1v\x02"))
            case "heartbeat other":
                fake.event(b"h", fake.heartbeat(cid=9).pack())
            case "topic":
                fake.event(rng.randbytes(3), b"x")
        if self._held_back and rng.random() < 0.4:
            late = self._held_back.pop(rng.randrange(len(self._held_back)))
            fake.publish(late.header_bytes, late.body)

    def end(self) -> None:
        """From now on all is well."""
        self._left = 0


@pytest.mark.parametrize("turn", [0, 1, *(pytest.param(n, marks=pytest.mark.soak) for n in range(2, 5 + ROUNDS // 20))])
def test_a_member_that_does_everything_wrong_loses_doubles_and_reorders_nothing(
    played: tuple[FakeMember, FaultyBroker], turn: int
) -> None:
    fake, broker = played
    rng = new_rng()
    transactions = make_transactions(rng, 120, large=0.2)
    mischief, receiver = Mischief(fake, rng), Receiver(broker)
    until(lambda: fake.acks, receiver.step, what="the stream is open")
    after, attempt = Position(START), 0
    while after.lsn < transactions[-1].lsn:
        attempt += 1
        frames = list(make_frames(rng, transactions, after, attempt=attempt))
        # Capture is restarted somewhere, also in the middle of a transaction.
        sent = frames[: rng.randint(1, len(frames))] if attempt < 8 else frames
        for frame in sent:
            mischief.send(frame)
            if rng.random() < 0.3:
                receiver.step(0.005)
            if rng.random() < 0.02:
                receiver.reopen()
        after = max((frame.here for frame in fake.frames if frame.here.complete), default=after)
    mischief.end()
    until(
        lambda: receiver.ledger.head.position >= Position(transactions[-1].lsn), receiver.step, within_s=60,
        what=f"everything after {mischief.done}",
    )  # fmt: skip
    assert receiver.ledger.transactions == transactions
    assert broker.alive
    print(mischief.done, "replays:", len(fake.requests), "begun again:", receiver.ledger.begun_again)
    counted = broker.status()[1]["received"]
    done = mischief.done
    assert bool(counted["gaps"]) >= bool(done.get("dropped", 0)), counted
    assert bool(counted["damaged"]) >= bool(done.get("body bit", 0)), counted
    assert broker.status()[2]["received"] is None


def small_frames(count: int, *, start: int = START) -> list[Frame]:
    """Return frames of one small transaction each."""
    frames = []
    for n in range(start, start + count):
        header = Header(CLUSTER, 1, 1, INCARNATION, Position(n), Position(n + 1), 1, 1, 1)
        frames.append(make_frame(header, [message_of(n + 1, b"row")]))
    return frames


def begin_chain(fake: FakeMember, receiver: Receiver, frames: list[Frame]) -> None:
    """Open the stream and get the first frames through."""
    until(lambda: fake.acks, receiver.step, what="the stream is open")
    for frame in frames:
        fake.keep(frame)
        fake.publish(frame.header_bytes, frame.body)
    until(lambda: receiver.ledger.head.position == frames[-1].here, receiver.step, what="the first frames")


def test_the_lost_last_frame_of_a_burst_is_noticed_by_the_heartbeat(played: tuple[FakeMember, FaultyBroker]) -> None:
    fake, broker = played
    receiver, frames = Receiver(broker), small_frames(20)
    begin_chain(fake, receiver, frames[:19])
    fake.keep(frames[19])
    until(lambda: receiver.ledger.head.position == frames[19].here, receiver.step, within_s=10)


def test_a_replay_that_brings_nothing_is_not_asked_for_without_rest(played: tuple[FakeMember, FaultyBroker]) -> None:
    fake, broker = played
    receiver, frames = Receiver(broker), small_frames(10)
    begin_chain(fake, receiver, frames[:5])
    fake.habits.serve = lambda _: "end"
    for frame in frames[5:]:
        fake.keep(frame)
    fake.publish(frames[-1].header_bytes, frames[-1].body)
    until(lambda: fake.requests, receiver.step)
    asked_until = time.monotonic() + 3
    until(lambda: time.monotonic() > asked_until, receiver.step)
    assert len(fake.requests) < 20, "an answer without a frame must not be followed by the same question at once"
    fake.habits.serve = lambda _: "well"
    until(lambda: receiver.ledger.head.position == frames[-1].here, receiver.step)


@pytest.mark.parametrize("habit", ["silent", "elsewhere", "error", "end"])
def test_another_member_is_asked_when_the_origin_does_not_serve(tmp_path: Path, habit: str) -> None:
    with playing(tmp_path, 2) as ((origin, other), broker):
        receiver, frames = Receiver(broker), small_frames(30)
        begin_chain(origin, receiver, frames[:10])
        origin.habits.serve = lambda _: habit
        for frame in frames:
            other.keep(frame)
        for frame in frames[10:]:
            origin.keep(frame)
        until(lambda: receiver.ledger.head.position == frames[-1].here, receiver.step, within_s=40)
        assert other.requests


def test_frames_of_a_later_version_keep_the_position(played: tuple[FakeMember, FaultyBroker]) -> None:
    fake, broker = played
    receiver, frames = Receiver(broker), small_frames(10)
    begin_chain(fake, receiver, frames[:5])
    later = replace(frames[5], header_bytes=frames[5].header_bytes[:1] + b"\x02" + frames[5].header_bytes[2:])
    fake.keep(later)
    fake.publish(later.header_bytes, later.body)
    for frame in frames[6:]:
        fake.keep(frame)
        fake.publish(frame.header_bytes, frame.body)
    until(lambda: len(fake.requests) > 1, receiver.step)
    assert receiver.ledger.head.position == frames[4].here
    until(lambda: "version 2" in alerts_of(broker, "refused"), receiver.step)
    assert "version 2" in broker.log()
    fake.frames = frames[:]
    until(lambda: receiver.ledger.head.position == frames[-1].here, receiver.step)


def test_status_says_that_heartbeats_of_a_later_version_are_not_read(played: tuple[FakeMember, FaultyBroker]) -> None:
    fake, broker = played
    eventually(lambda: broker.status()[1]["heartbeat_age_s"] is not None, what="the member is heard")
    fake.habits.heartbeats = False
    later = fake.heartbeat().pack().replace(b"\xa1v\x01", b"\xa1v\x02")

    def told() -> bool:
        fake.event(b"h", later)
        time.sleep(0.1)
        found = broker.status()[1]
        return found["state"] == "ERROR" and "nothing heard" in found["error"] and "version 2" in found["error"]

    eventually(told, within_s=20)
    eventually(lambda: "version 2" in alerts_of(broker, "not-receiving"), within_s=20)


@pytest.mark.parametrize("ahead_s", [7, -7])
def test_status_estimates_how_far_clocks_differ(played: tuple[FakeMember, FaultyBroker], ahead_s: int) -> None:
    fake, broker = played

    def estimate() -> float | None:
        skew: float | None = broker.status()[1]["clock_skew_s"]
        return skew

    eventually(lambda: estimate() is not None, what="the member is heard")
    assert -1 < (estimate() or 0) <= 0.001, "both clocks are this machine's"
    fake.habits.heartbeats = False

    def told() -> bool:
        time_us = (time.time_ns() + ahead_s * 10**9) // 1000
        fake.event(b"h", fake.heartbeat(time_us=time_us).pack())
        return ahead_s - 1 < (estimate() or 0) <= ahead_s

    eventually(told, within_s=20)
    assert broker.status()[2]["clock_skew_s"] == 0
    eventually(lambda: estimate() is None, within_s=10, what="nothing is said of a member that is not heard")
