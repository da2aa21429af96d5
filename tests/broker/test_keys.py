"""Keys that are changed: under load, whatever is killed at whichever step, and whoever was away meanwhile."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.cluster.state_directory import StateDirectory
from broker.net import sockets
from broker.net.keys import KeyPair, NodeKeys
from pmgsync.core.membership import ClusterDocument, Member, SignedDocument, sign, with_keys
from pmgsync.errors import PmgsyncError
from tests.harness.brokers import FaultyBroker, Receiver, Source, make_transactions, running_brokers, until
from tests.harness.cluster import eventually

UPDATE = {"op": "member.update", "keys": True}


def held(broker: FaultyBroker) -> SignedDocument:
    signed = StateDirectory(broker.state_dir).document()
    assert signed is not None
    return signed


def keys_of(broker: FaultyBroker) -> NodeKeys:
    """Return the keys that a node uses: those that the document on its disk names."""
    keys = StateDirectory(broker.state_dir).keys()
    keys.follow(held(broker).document)
    return keys


def change_keys(broker: FaultyBroker) -> KeyPair:
    """Have a node change its keys; return the old ones."""
    before = keys_of(broker).current
    link = broker.link("cli")
    link.request(UPDATE, timeout_s=20)
    broker.links.remove(link)
    link.close()
    assert keys_of(broker).curve_public != before.curve_public
    assert keys_of(broker).sign_public != before.sign_public
    return before


def opens(pair: KeyPair, member: Member, port: int) -> bool:
    """Return True when a member's port takes a key."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sockets.open_socket(context, zmq.SUB if port == member.events else zmq.DEALER)
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    try:
        sockets.connect(socket, pair, member.curve_key, member.address, port)
        assert monitor.poll(10_000), "the port answers"
        return bool(parse_monitor_message(monitor.recv_multipart())["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        context.destroy(linger=0)


def in_touch(brokers: Sequence[FaultyBroker]) -> bool:
    """Return True when the first nodes of a cluster hold the same document, it names the keys that they use, and each
    hears every other."""
    documents = [held(broker) for broker in brokers]
    if len({one.body for one in documents}) != 1:
        return False
    for cid, broker in enumerate(brokers, 1):
        member = documents[0].document.member(cid)
        keys = keys_of(broker)
        if member is None or (member.curve_key, member.sign_key) != (keys.curve_public, keys.sign_public):
            return False
        try:
            status = broker.status()
            ages = [status[other]["heartbeat_age_s"] for other in range(1, len(brokers) + 1)]
        except PmgsyncError:
            return False
        if not all(age is not None and age < 2 for age in ages):
            return False
    return True


def forgotten(brokers: Sequence[FaultyBroker]) -> bool:
    """Return True when nobody has keys but those in use."""
    return all(not list(StateDirectory(broker.state_dir).keys().others) for broker in brokers)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[FaultyBroker]]:
    with running_brokers(tmp_path, 3) as brokers:
        eventually(lambda: in_touch(brokers), within_s=20, what="the cluster stands")
        yield brokers


def test_keys_change_under_load_and_the_old_ones_open_nothing(three: list[FaultyBroker]) -> None:
    rng = random.Random(7)
    transactions = make_transactions(rng, 3000, large=0.05)
    source, receivers = Source(three[0], rng, transactions), [Receiver(broker) for broker in three[1:]]
    for number in (1, 0, 2, 0):
        with ThreadPoolExecutor(1) as pool:
            change = pool.submit(change_keys, three[number])
            until(
                change.done,
                lambda: source.step(2), *(receiver.step for receiver in receivers), what="the keys are changed",
            )  # fmt: skip
            old = change.result()
        until(
            lambda: in_touch(three),
            lambda: source.step(1), *(receiver.step for receiver in receivers), what="all hear each other again",
        )  # fmt: skip
        for broker in three:
            member = held(broker).document.member(three.index(broker) + 1)
            assert member is not None
            if broker is not three[number]:
                assert not opens(old, member, member.control)
                assert not opens(old, member, member.events)
                assert opens(keys_of(three[number]).current, member, member.control)
    until(
        lambda: all(len(receiver.ledger.transactions) == len(transactions) for receiver in receivers),
        source.step, *(receiver.step for receiver in receivers), what="everything arrives",
    )  # fmt: skip
    assert all(receiver.ledger.transactions == transactions for receiver in receivers)
    eventually(lambda: forgotten(three), within_s=20, what="old keys are forgotten")


def restarted_with(brokers: Sequence[FaultyBroker], number: int, cid: int) -> ClusterDocument:
    """Restart a broker that has died after it stored the document in which a node has its pending keys."""
    master, node = brokers[number], brokers[cid - 1]
    pending = StateDirectory(node.state_dir).keys().pending
    assert pending is not None
    before = held(master)
    changed = with_keys(before.document, cid, pending.curve_public, pending.sign_public)
    StateDirectory(master.state_dir).store_document(sign(changed, 1, keys_of(master).sign_private, after=before))
    master.start()
    return changed


def make_pending(broker: FaultyBroker) -> KeyPair:
    """Leave a killed broker's keys as they are when it dies after the first step."""
    state = StateDirectory(broker.state_dir)
    keys = state.keys()
    keys.pending = KeyPair.generate()
    state.store_keys(keys)
    return keys.pending


def test_a_node_that_died_before_it_asked_goes_on_and_uses_the_same_keys_later(three: list[FaultyBroker]) -> None:
    three[1].kill()
    pending = make_pending(three[1])
    three[1].start()
    eventually(lambda: in_touch(three), within_s=20)
    change_keys(three[1])
    assert keys_of(three[1]).curve_public == pending.curve_public
    eventually(lambda: in_touch(three), within_s=20)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.campaign), 3])
def test_a_node_that_died_before_it_learned_of_its_change_takes_it_over(tmp_path: Path, count: int) -> None:
    with running_brokers(tmp_path, count) as brokers:
        eventually(lambda: in_touch(brokers), within_s=20)
        for broker in brokers[:2]:
            broker.kill()
        pending = make_pending(brokers[1])
        restarted_with(brokers, 0, 2)
        brokers[1].start()
        eventually(lambda: in_touch(brokers), within_s=20, what="the node uses the keys that the master knows")
        assert keys_of(brokers[1]).curve_public == pending.curve_public
        eventually(lambda: forgotten(brokers), within_s=20)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.campaign), 3])
def test_a_master_that_died_before_it_told_anybody_is_followed(tmp_path: Path, count: int) -> None:
    with running_brokers(tmp_path, count) as brokers:
        eventually(lambda: in_touch(brokers), within_s=20)
        brokers[0].kill()
        pending = make_pending(brokers[0])
        restarted_with(brokers, 0, 1)
        eventually(lambda: in_touch(brokers), within_s=20, what="the others follow the master")
        assert keys_of(brokers[0]).curve_public == pending.curve_public
        eventually(lambda: forgotten(brokers), within_s=20)


@pytest.mark.campaign
def test_who_was_away_while_all_others_changed_their_keys_twice_comes_back(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 4) as brokers:
        eventually(lambda: in_touch(brokers), within_s=20)
        brokers[3].kill()
        for broker in [*brokers[:3], *brokers[:3]]:
            change_keys(broker)
            eventually(lambda: in_touch(brokers[:3]), within_s=20)
        assert not forgotten(brokers), "the one who is away may know the old ones alone"
        brokers[3].start()
        eventually(lambda: in_touch(brokers), within_s=30, what="it hears of the new keys")
        eventually(lambda: forgotten(brokers), within_s=20)


def test_a_master_that_few_hear_does_not_change_its_keys(three: list[FaultyBroker]) -> None:
    for broker in three[1:]:
        broker.kill()
    eventually(lambda: all((node["heartbeat_age_s"] or 9) > 4 for cid, node in three[0].status().items() if cid > 1))
    before = keys_of(three[0])
    with pytest.raises(PmgsyncError, match="fewer than half of the members"):
        three[0].link("cli").request(UPDATE)
    three[1].start()
    eventually(lambda: in_touch(three[:2]) or (three[0].status()[2]["heartbeat_age_s"] or 9) < 2)
    three[0].kill()
    with pytest.raises(PmgsyncError, match="master is not connected"):
        eventually(lambda: three[1].link("cli").request(UPDATE), within_s=20)
    assert keys_of(three[0]).curve_public == before.curve_public


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_kill_at_any_moment_of_a_change(three: list[FaultyBroker], number: int) -> None:
    """The command is given, and within a tenth of a second this node or its master is killed: again and again."""
    rng = random.Random(number)
    first = keys_of(three[number]).curve_public
    for turn in itertools.count():
        link = three[number].link("cli")
        link.send({**UPDATE, "id": 1})
        time.sleep(rng.uniform(0, 0.1))
        victim = rng.choice([three[0], three[number]])
        victim.kill()
        three[number].links.remove(link)
        link.close()
        victim.start()
        eventually(lambda: in_touch(three), within_s=30, what=f"all hear each other after kill {turn}")
        if turn >= 5:
            break
    change_keys(three[number])
    eventually(lambda: in_touch(three), within_s=30)
    assert keys_of(three[number]).curve_public != first
    eventually(lambda: forgotten(three), within_s=20)
