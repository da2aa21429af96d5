"""A real broker among members that the test plays."""

from __future__ import annotations

import os
import random
import secrets

from tests.harness.brokers import (
    FaultyBroker,
)

ROUNDS = int(os.environ.get("PMGSYNC_ROUNDS", "1"))


def new_rng() -> random.Random:
    """Return a random generator and print its seed."""
    seed = int(os.environ.get("PMGSYNC_SEED") or secrets.randbits(32))
    print(f"PMGSYNC_SEED={seed}")
    return random.Random(seed)


def alerts_of(broker: FaultyBroker, kind: str) -> str:
    """Return the texts of one kind of alerts that a broker shows of itself, which is the last member."""
    nodes = broker.status()
    return " | ".join(alert["text"] for alert in nodes[max(nodes)]["alerts"] if alert["kind"] == kind)
