"""Brokers over bad links, with slow receivers, killed at any moment: nothing is lost or doubled."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmgsync.core.positions import Position
from pmgsync.errors import ResyncRequiredError
from tests.harness.brokers import (
    INCARNATION,
    MEMORY_MIB,
    START,
    FaultyBroker,
    Receiver,
    Source,
    make_transactions,
    running_brokers,
    until,
)
from tests.harness.cluster import eventually
from tests.harness.played import BLOCK, ROUNDS, BlockSource, alerts_of, blocks, new_rng
from tests.harness.proxy import Link, Proxy, Way

pytestmark = pytest.mark.cluster


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


ALWAYS = {"cut", "hole from 1 to 2", "bits flipped"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.campaign]) for name in FAULTS]
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


UNTIL_QUIET = """
import os, sys
from broker import main
from broker.node import Broker
beat = Broker._beat
Broker._beat = lambda self: None if os.path.exists(sys.argv[-1] + ".quiet") else beat(self)
main.run()
"""


def test_who_connects_again_learns_at_once_what_it_has_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame follows that would show the gap, and no heartbeat falls due."""
    monkeypatch.setattr(FaultyBroker, "program", ("-c", UNTIL_QUIET))
    with running_brokers(tmp_path, 2, proxied=True) as brokers:
        source, receiver = BlockSource(brokers[0], random.Random(), blocks(40)), Receiver(brokers[1])
        until(lambda: receiver.ledger.transactions, lambda: source.step(1), receiver.step)
        for link in links_of(brokers):
            link.each(Proxy.refuse)
        for broker in brokers:
            broker.config.with_name(f"{broker.config.name}.quiet").touch()
        until(lambda: source.done, source.step, receiver.step)
        assert len(receiver.ledger.transactions) < 40
        for link in links_of(brokers):
            link.heal()
        until(lambda: len(receiver.ledger.transactions) == 40, source.step, receiver.step)
        assert receiver.ledger.transactions == source.transactions


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
    eventually(lambda: "node1" in alerts_of(two, "control"), within_s=20)
    found = two.status()[1]
    assert found["heartbeat_age_s"] < 3, "its events come"
    control.heal()
    eventually(lambda: not alerts_of(two, "control"), within_s=20)


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


def test_a_journal_that_is_older_than_the_database_goes_on_without_the_origin(tmp_path: Path) -> None:
    """A killed broker's journal may end before what its database has applied, and the others may have forgotten it."""
    with running_brokers(tmp_path, 3) as (one, two, three):
        rng = new_rng()
        transactions = make_transactions(rng, 600)
        source, receiver, late = Source(one, rng, transactions), Receiver(two), Receiver(three)
        until(lambda: late.ledger.transactions, lambda: source.step(2), receiver.step, late.step)
        three.kill()
        older = tmp_path / "older"
        shutil.copytree(three.state_dir / "journal", older)
        upto = late.ledger.head.complete
        three.start()
        until(
            lambda: _forgotten(two, Position(upto.lsn + 1)),
            lambda: source.step(3), lambda: receiver.step(0.01), lambda: late.step(0.01),
        )  # fmt: skip
        three.kill()
        until(lambda: len(receiver.ledger.transactions) == len(transactions), source.step, receiver.step)
        one.kill()
        shutil.rmtree(three.state_dir / "journal")
        older.rename(three.state_dir / "journal")
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
        # Killed, it may have lost what was not written yet, and learns from apply that it stands further on.
        told = re.findall(r"action=resync-required origin=1 position=(\S+)", two.log())
        assert len(told) in {1, 2}
        assert len(set(told)) == len(told), "found again and again, it is logged once for each position"
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
