"""A real broker among members that the test plays."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator

from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import Position
from tests.harness.brokers import CLUSTER, INCARNATION, START, FaultyBroker, Source, Transaction, message_of

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


BLOCK = 64 << 10


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
