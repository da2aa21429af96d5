"""Brokers under fault, real processes: whatever links, peers and signals do, every transaction arrives once, in order.

`make soak` runs what takes longer; PMGSYNC_ROUNDS multiplies its rounds, PMGSYNC_SEED fixes the seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import Position
from pmgsync.errors import ResyncRequiredError
from tests.harness.brokers import (
    CLUSTER,
    INCARNATION,
    MEMORY_MIB,
    START,
    FaultyBroker,
    Receiver,
    Source,
    Transaction,
    document_of,
    make_frames,
    make_transactions,
    message_of,
    running_brokers,
    until,
)
from tests.harness.cluster import eventually
from tests.harness.fake_member import FakeMember, Habits
from tests.harness.proxy import Link, Proxy, Way

pytestmark = pytest.mark.cluster

ROUNDS = int(os.environ.get("PMGSYNC_ROUNDS", "1"))
BLOCK = 64 << 10


def new_rng() -> random.Random:
    """Return a random generator and print its seed."""
    seed = int(os.environ.get("PMGSYNC_SEED") or secrets.randbits(32))
    print(f"PMGSYNC_SEED={seed}")
    return random.Random(seed)


def blocks(count: int, *, start: int = START) -> list[Transaction]:
    """Return transactions of one row of nearly 64 KiB each."""
    return [Transaction(start + n + 1, (os.urandom(BLOCK - 200),)) for n in range(count)]


class BlockSource(Source):
    """A capture whose every transaction is a frame of its own."""

    def _open(self) -> None:
        super()._open()
        position = self.told[-1]

        def frames() -> Iterator[Frame]:
            prev = position
            for transaction in self.transactions:
                here = Position(transaction.lsn)
                if here > prev:
                    header = Header(CLUSTER, 1, 1, INCARNATION, prev, here, 1, 1, 1)
                    yield make_frame(header, [message_of(transaction.lsn, transaction.rows[0])])
                    prev = here

        self._frames = frames()


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
    until(lambda: "version 2" in _alerts(broker, "refused"), receiver.step)
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
    eventually(lambda: "version 2" in _alerts(broker, "not-receiving"), within_s=20)


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


def _alerts(broker: FaultyBroker, kind: str) -> str:
    """Return the texts of one kind of alerts that a broker shows of itself, which is the last member."""
    nodes = broker.status()
    return " | ".join(alert["text"] for alert in nodes[max(nodes)]["alerts"] if alert["kind"] == kind)


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[list[FaultyBroker]]:
    """Two brokers that reach each other through proxies only."""
    with running_brokers(tmp_path, 2, proxied=True) as brokers:
        yield brokers


def links_of(brokers: list[FaultyBroker]) -> list[Link]:
    return [broker.link_in for broker in brokers if broker.link_in is not None]


def everywhere(act: Callable[[Proxy], object]) -> Callable[[list[FaultyBroker]], None]:
    """Return the fault that does something to every proxy of every broker."""

    def fault(brokers: list[FaultyBroker]) -> None:
        for link in links_of(brokers):
            link.each(act)

    return fault


def one_way(way: Way) -> Callable[[list[FaultyBroker]], None]:
    """Return the fault that loses what goes from node 1 to node 2 (UP: the other way), on every connection."""

    def fault(brokers: list[FaultyBroker]) -> None:
        one, two = links_of(brokers)
        one.each(lambda proxy: proxy.hole([Way.DOWN if way is Way.DOWN else Way.UP]))
        two.each(lambda proxy: proxy.hole([Way.UP if way is Way.DOWN else Way.DOWN]))

    return fault


def _slow_down(proxy: Proxy) -> None:
    proxy.delay(0.3)
    proxy.throttle(200_000)


FAULTS = {
    "cut": (everywhere(Proxy.cut), 0.5),
    "refused": (everywhere(Proxy.refuse), 3.0),
    "hole both ways": (everywhere(Proxy.hole), 6.0),
    "hole from 1 to 2": (one_way(Way.DOWN), 6.0),
    "hole from 2 to 1": (one_way(Way.UP), 6.0),
    "flapping": (everywhere(lambda proxy: proxy.flap(0.4)), 3.0),
    "delay": (everywhere(_slow_down), 2.0),
    "bits flipped": (everywhere(lambda proxy: proxy.flip_bits(1)), 2.0),
}


ONLY_LONG = {"hole from 2 to 1"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if name in ONLY_LONG else []) for name in FAULTS]
)
def test_everything_arrives_over_a_link_with(proxied: list[FaultyBroker], name: str) -> None:
    one, two = proxied
    rng = new_rng()
    transactions = make_transactions(rng, 1000)
    source, receiver = Source(one, rng, transactions), Receiver(two)
    until(lambda: len(receiver.ledger.transactions) > 20, lambda: source.step(2), receiver.step)
    opened = receiver.reopened
    fault, lasting_s = FAULTS[name]
    fault(proxied)
    over = time.monotonic() + lasting_s
    until(lambda: time.monotonic() > over, lambda: source.step(3), receiver.step)
    for link in links_of(proxied):
        link.heal()
    until(
        lambda: len(receiver.ledger.transactions) == len(transactions), lambda: source.step(50), receiver.step,
        what=f"everything after {name}; {len(receiver.ledger.transactions)} of {len(transactions)} are there",
    )  # fmt: skip
    assert receiver.ledger.transactions == transactions
    assert receiver.reopened == opened, "an apply worker does not notice what happens on the network"
    until(lambda: not _problems(one) and not _problems(two), source.step, receiver.step, what="both are well again")


def _problems(broker: FaultyBroker) -> list[str]:
    """Return what a broker sees of its peer's connection; that no agent runs here is no problem of the link."""
    errors = [node["error"] or "" for node in broker.status().values()]
    return [error for error in errors if error and "not running" not in error]


def test_a_control_connection_that_a_flipped_bit_ended_is_made_anew(proxied: list[FaultyBroker]) -> None:
    """libzmq gives a connecting socket up for good after a damaged message, or where ZAP has denied it."""
    one, two = proxied
    source, receiver = BlockSource(one, random.Random(), blocks(60)), Receiver(two)
    until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
    events, control = links_of(proxied)[0].proxies[:2]
    control.flip_bits(1, [Way.DOWN])
    until(lambda: control.flipped, receiver.step, what="a bit flipped")
    # What is published now must be fetched by a replay, over a control connection.
    events.refuse()
    until(lambda: source.done, source.step, receiver.step)
    events.heal()
    until(lambda: len(receiver.ledger.transactions) == 60, source.step, receiver.step)
    assert receiver.ledger.transactions == source.transactions


def test_a_control_port_that_is_shut_is_shown_while_events_come(proxied: list[FaultyBroker]) -> None:
    _, two = proxied
    control = links_of(proxied)[0].proxies[1]
    eventually(lambda: two.status()[1]["heartbeat_age_s"] is not None, what="the member is heard")
    control.refuse()
    eventually(lambda: "node1" in _alerts(two, "control"), within_s=20)
    found = two.status()[1]
    assert found["heartbeat_age_s"] < 3, "its events come"
    control.heal()
    eventually(lambda: not _alerts(two, "control"), within_s=20)


# -- slow and stopped receivers ---------------------------------------------------------------------------------------


def test_a_stopped_slave_delays_nobody_and_gets_everything_when_it_goes_on(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 3) as (one, two, three):
        count = 1200
        source = BlockSource(one, random.Random(), blocks(count))
        stopped, other = Receiver(two), Receiver(three)
        until(
            lambda: stopped.ledger.transactions and other.ledger.transactions,
            lambda: source.step(1), stopped.step, other.step,
        )  # fmt: skip
        two.signal(signal.SIGSTOP)
        peak = 0.0

        def measure() -> None:
            nonlocal peak
            peak = max(peak, *(broker.rss_mib() for broker in (one, two, three)))

        until(lambda: len(other.ledger.transactions) == count, source.step, other.step, measure)
        two.signal(signal.SIGCONT)
        until(lambda: len(stopped.ledger.transactions) == count, source.step, stopped.step, other.step, measure)
        print(f"peak RSS {peak:.0f} MiB")
        assert peak < MEMORY_MIB
        assert stopped.ledger.transactions == other.ledger.transactions == source.transactions
        assert "action=replay " in two.log()


def test_an_apply_worker_that_gives_no_credit_costs_no_memory_and_delays_nobody(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 2) as (one, two):
        count = 1000
        source = BlockSource(one, random.Random(), blocks(count))
        idle, other = Receiver(two, worker="apply:1", credit=0), Receiver(two, worker="apply:8", confirms=False)
        until(lambda: other.ledger.transactions, lambda: source.step(1), idle.step, other.step)
        peak = 0.0

        def measure() -> None:
            nonlocal peak
            peak = max(peak, two.rss_mib())

        until(lambda: len(other.ledger.transactions) == count, source.step, idle.step, other.step, measure)
        print(f"peak RSS {peak:.0f} MiB")
        assert peak < MEMORY_MIB
        assert not idle.ledger.transactions
        idle.give(10 * BLOCK)
        until(lambda: len(idle.ledger.transactions) >= 10, idle.step, other.step)
        assert len(idle.ledger.transactions) <= 11, "credit goes below zero by one frame at most"
        idle.give(count * BLOCK)
        until(lambda: len(idle.ledger.transactions) == count, idle.step, other.step)
        assert idle.ledger.transactions == source.transactions


@pytest.mark.parametrize("stopped", [2, pytest.param(1, marks=pytest.mark.soak)])
def test_a_broker_stopped_for_longer_than_every_time_out_is_shown_and_recovers(tmp_path: Path, stopped: int) -> None:
    with running_brokers(tmp_path, 2) as (one, two):
        rng = new_rng()
        transactions = make_transactions(rng, 800)
        source, receiver = Source(one, rng, transactions), Receiver(two)
        until(lambda: receiver.ledger.transactions, lambda: source.step(2), receiver.step)
        until(lambda: not _problems(one) and not _problems(two), receiver.step, what="they hear each other")
        broker, other = (one, two) if stopped == 1 else (two, one)
        # The worker of the stopped broker waits for it; only the other one's goes on.
        step = receiver.step if stopped == 1 else lambda: source.step(2)
        broker.signal(signal.SIGSTOP)
        since = time.monotonic()

        def shown() -> bool:
            error = other.status()[stopped]["error"] or ""
            return "nothing heard" in error

        until(shown, step, within_s=8, what="the stopped broker is shown")
        assert other.status()[stopped]["state"] == "ERROR"
        until(lambda: time.monotonic() - since > 11, step)
        broker.signal(signal.SIGCONT)
        until(lambda: not _problems(one) and not _problems(two), lambda: source.step(2), receiver.step)
        until(lambda: len(receiver.ledger.transactions) == len(transactions), source.step, receiver.step)
        assert receiver.ledger.transactions == transactions


# -- kill -9, and what is gone ----------------------------------------------------------------------------------------


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [10, pytest.param(min(50 * ROUNDS, 500), marks=pytest.mark.soak)])
def test_brokers_killed_at_any_moment_lose_and_double_nothing(tmp_path: Path, kills: int) -> None:
    with running_brokers(tmp_path, 2) as (one, two):
        rng = new_rng()
        transactions = make_transactions(rng, 500 * kills, large=0.05)
        source, receiver = Source(one, rng, transactions), Receiver(two)
        for _ in range(kills):
            seen, wanted = len(receiver.ledger.transactions), rng.randint(1, 300)
            until(
                lambda: len(receiver.ledger.transactions) >= min(seen + wanted, len(transactions)),  # noqa: B023
                lambda: source.step(rng.randint(1, 40)), lambda: receiver.step(0.001),
            )  # fmt: skip
            victim = rng.choice([one, two, two])
            source.step(rng.randint(1, 200))
            victim.kill()
            if rng.random() < 0.3:
                receiver.reopen()
            victim.start()
        until(lambda: len(receiver.ledger.transactions) == len(transactions), source.step, receiver.step)
        assert receiver.ledger.transactions == transactions
        print(f"capture opened {len(source.told)} times, apply {receiver.reopened + 1} times")


def test_another_member_replays_the_chain_of_a_dead_origin(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 3) as (one, two, three):
        rng = new_rng()
        transactions = make_transactions(rng, 600)
        source, receiver, late = Source(one, rng, transactions), Receiver(two), Receiver(three)
        until(lambda: late.ledger.transactions, lambda: source.step(2), receiver.step, late.step)
        three.kill()
        until(lambda: len(receiver.ledger.transactions) == len(transactions), source.step, receiver.step)
        one.kill()
        three.start()
        until(lambda: len(late.ledger.transactions) == len(transactions), receiver.step, late.step)
        assert late.ledger.transactions == transactions


def test_who_is_behind_the_journal_is_told_to_resynchronise(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 2, extra='[journal]\nmax_size = "1MiB"\n') as (one, two):
        count = 300
        source = BlockSource(one, random.Random(), blocks(count))
        receiver = Receiver(two)
        until(lambda: len(receiver.ledger.transactions) >= 5, lambda: source.step(1), receiver.step)
        two.kill()
        receiver.reopen()
        until(lambda: source.done and source.durable.lsn == START + count, source.step)
        until(lambda: _forgotten(one, Position(START + 20)), source.step, what="the journal was trimmed")
        two.start()
        before = len(receiver.ledger.transactions)
        with pytest.raises(ResyncRequiredError):
            until(lambda: False, source.step, receiver.step, what="it is told")
        got = len(receiver.ledger.transactions)
        assert receiver.ledger.transactions == list(source.transactions[:got]), "what it got until then has no hole"
        assert before <= got < count
        again = time.monotonic() + 3
        with pytest.raises(ResyncRequiredError):
            until(lambda: False, Receiver(two, known=True).step, what="whoever asks later is told too")
        until(lambda: time.monotonic() > again, source.step)
        assert two.log().count("action=resync-required") == 1
        # A snapshot later: it stands at the end, and what follows reaches it.
        source.transactions = [*source.transactions, *blocks(10, start=START + count)]
        source.restart()
        resynced = Receiver(two, known=True)
        resynced.ledger = type(resynced.ledger)(Position(START + count))
        until(lambda: len(resynced.ledger.transactions) == 10, source.step, resynced.step)
        assert resynced.ledger.transactions == source.transactions[count:]


def _forgotten(broker: FaultyBroker, position: Position) -> bool:
    """Return True when a broker's journal of chain 1 begins after a position: it refuses to replay from there."""
    cli = broker.link("cli")
    request = {"op": "replay", "origin": 1, "incarnation": INCARNATION, "position": list(position), "credit": 1}
    try:
        cli.request(request)
    except ResyncRequiredError:
        return True
    finally:
        broker.links.remove(cli)
        cli.close()
    return False
