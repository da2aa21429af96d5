"""The lease between real brokers: what the agent of the master is told while members come, go and are paused."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.membership import sign, with_fence
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from tests.harness.brokers import FaultyBroker, document_of
from tests.harness.cluster import eventually
from tests.harness.strangers import answers_status

pytestmark = pytest.mark.cluster

LEASE_S = 1.0


class Fenced:
    """Three brokers, fenced, with a lease of a second; the test plays the master's lease worker."""

    def __init__(self, directory: Path) -> None:
        self.brokers = [FaultyBroker(directory, f"node{cid}") for cid in (1, 2, 3)]
        document = with_fence(document_of(self.brokers).document, "lease")
        document = replace(document, lease_ms=round(LEASE_S * 1000))
        signed = sign(document, 1, StateDirectory(self.brokers[0].state_dir).keys().sign_private)
        for broker in self.brokers:
            StateDirectory(broker.state_dir).store_document(signed)
            broker.start()
        self.master, *self.others = self.brokers
        self.until = 0.0
        self.agent = self.connect()

    def connect(self) -> BrokerLink:
        eventually(lambda: answers_status(self.master), what="the broker serves")
        return self.master.link("lease")

    def read(self) -> None:
        """Take what the broker says, as the agent does."""
        newest: Message | None = None
        while (received := self.agent.receive(0.05)) is not None:
            if received[0]["op"] == "lease":
                newest = received[0]
        if newest is not None:
            self.until = newest["until"]
            assert newest["fenced"]
            assert self.until < time.monotonic() + LEASE_S, "longer than a lease"
            self.agent.send({"op": "lease.told", "number": newest["number"], "guarded": True})
        self.agent.send({"op": "report"})

    def is_open(self) -> bool:
        self.read()
        return self.until > time.monotonic()

    def pause(self, *brokers: FaultyBroker) -> None:
        for broker in brokers:
            broker.signal(signal.SIGSTOP)

    def wake(self, *brokers: FaultyBroker) -> None:
        for broker in brokers:
            broker.signal(signal.SIGCONT)


@pytest.fixture
def fenced(tmp_path: Path) -> Iterator[Fenced]:
    cluster = None
    try:
        cluster = Fenced(tmp_path)
        eventually(cluster.is_open, what="a majority acknowledges the master")
        yield cluster
    finally:
        for broker in cluster.brokers if cluster is not None else ():
            broker.close()


def test_it_lasts_as_long_as_a_majority_answers(fenced: Fenced) -> None:
    fenced.pause(fenced.others[0])
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        assert fenced.is_open(), "one of the others is enough"
    fenced.pause(fenced.others[1])
    eventually(lambda: not fenced.is_open(), within_s=3)
    fenced.wake(fenced.others[0])
    eventually(fenced.is_open, what="it opens again")


def test_a_master_that_was_killed_is_closed_until_it_is_acknowledged_again(fenced: Fenced) -> None:
    fenced.pause(*fenced.others)
    fenced.master.kill()
    fenced.agent.close()
    fenced.master.links.remove(fenced.agent)
    fenced.master.start()
    fenced.agent, fenced.until = fenced.connect(), 0.0
    end = time.monotonic() + LEASE_S
    while time.monotonic() < end:
        assert not fenced.is_open()
    fenced.wake(*fenced.others)
    eventually(fenced.is_open)


def test_a_member_that_was_killed_acknowledges_the_same_master_at_once(fenced: Fenced) -> None:
    fenced.pause(fenced.others[0])
    fenced.others[1].kill()
    eventually(lambda: not fenced.is_open(), within_s=3)
    fenced.others[1].start()
    eventually(fenced.is_open)


def test_status_says_until_when_and_by_whom(fenced: Fenced) -> None:
    link = fenced.master.link("cli")
    lease = link.request({"op": "status"})[0]["status"]["lease"]
    assert (lease["fence"], lease["voters"], lease["majority"]) == ("lease", 3, 2)
    assert lease["open"]
    assert 0 < lease["left_s"] <= LEASE_S
    assert lease["promised_to"] == 1
    fenced.pause(*fenced.others)
    eventually(lambda: not fenced.is_open(), within_s=3)
    lease = link.request({"op": "status"})[0]["status"]["lease"]
    assert lease["missing"] == [2, 3]
    assert not lease["open"]
