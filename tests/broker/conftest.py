"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cluster.state_directory import StateDirectory
from pmgsync.core.membership import first_document, sign, with_member
from tests.harness.broker_process import CLUSTER, Broker
from tests.harness.brokers import (
    FaultyBroker,
    running_brokers,
)
from tests.harness.cluster import eventually
from tests.harness.strangers import answers_status


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Broker, Broker]]:
    one, two = Broker(tmp_path, "one"), Broker(tmp_path, "two")
    try:
        document = with_member(first_document(CLUSTER, "test", "mirror", one.member()), two.member())
        signed = sign(document, 1, StateDirectory(one.state_dir).keys().sign_private)
        for broker in (one, two):
            StateDirectory(broker.state_dir).store_document(signed)
            broker.start()
        yield one, two
    finally:
        one.close()
        two.close()


@pytest.fixture
def one(tmp_path: Path) -> Iterator[FaultyBroker]:
    """A cluster of one."""
    with running_brokers(tmp_path, 1) as (broker,):
        eventually(lambda: answers_status(broker), what="the broker serves")
        yield broker
