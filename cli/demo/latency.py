"""How long mails take from their commit on one node until they can be read on the others, measured from outside.

Each mail's commit is noted when it has returned. One watcher a node asks its database again and again for the newest
mail of every other node; whatever has become visible since the last look took at most until now. So the figures are
never too small, and too large by one look at most.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

LOOK_EVERY_S = 0.005


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of all values do not exceed, None when there are none."""
    if not values:
        return None
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


class Latency:
    """Collects the times of all mails; one sample is one mail on one other node."""

    def __init__(self, cids: Sequence[int]) -> None:
        self._lock = threading.Lock()
        self._open = {(origin, node): deque[tuple[int, float]]() for origin in cids for node in cids if origin != node}
        self._seen = dict.fromkeys(self._open, 0)
        self.samples: list[float] = []

    def committed(self, origin: int, rid: int) -> None:
        """A mail was committed on its origin just now."""
        now = time.monotonic()
        with self._lock:
            for (of, node), mails in self._open.items():
                if of == origin:
                    if self._seen[of, node] >= rid:
                        # It was read elsewhere before its commit had returned here.
                        self.samples.append(0.0)
                    else:
                        mails.append((rid, now))

    def leave(self, cid: int) -> None:
        """Count nothing more of a node that is lost: neither what it still has to show nor what is still to come."""
        with self._lock:
            for pair in [pair for pair in self._open if cid in pair]:
                del self._open[pair]

    def visible(self, origin: int, node: int, rid: int, asked: float) -> None:
        """All of an origin's mails up to `rid` could be read on a node; the answer came at `asked` (monotonic)."""
        with self._lock:
            self._seen[origin, node] = max(rid, self._seen[origin, node])
            mails = self._open.get((origin, node), deque())
            while mails and mails[0][0] <= rid:
                self.samples.append(max(0.0, asked - mails.popleft()[1]))

    @property
    def waiting(self) -> int:
        """How many mails are still to become visible, counted once for each node that lacks them."""
        with self._lock:
            return sum(map(len, self._open.values()))

    def summary(self) -> dict[str, float | int | None]:
        """Return the number of samples, and median, 99th percentile and maximum in milliseconds."""
        with self._lock:
            samples = [1000 * sample for sample in self.samples]
        figures = {
            "median": statistics.median(samples) if samples else None,
            "p99": percentile(samples, 0.99),
            "max": max(samples, default=None),
        }
        rounded = {f"lag_{name}_ms": None if value is None else round(value, 1) for name, value in figures.items()}
        return {"lag_samples": len(samples), **rounded}


class Watcher(threading.Thread):
    """Looks at one node for the other nodes' mails.

    Attributes:
        error: what ended it early, "" when nothing did.
        may_end: the node may be lost, and the watcher with it.
    """

    def __init__(self, dsn: str, cid: int, others: Sequence[int], latency: Latency, stop: threading.Event) -> None:
        super().__init__(name=f"watcher of node {cid}", daemon=True)
        self.error = ""
        self.may_end = False
        self._dsn = dsn
        self._cid = cid
        self._others = others
        self._latency = latency
        self._halt = stop

    def run(self) -> None:
        from pmgsync.postgres.session import connect

        try:
            with contextlib.closing(connect(self._dsn, application_name="pmgcm demo watcher")) as connection:
                connection.autocommit = True
                self._look(connection)
        except Exception as error:  # whatever it is, the figures would be wrong without this watcher
            if not self.may_end:
                self.error = f"{self.name}: {type(error).__name__}: {str(error).strip()}"

    def _look(self, connection: Any) -> None:
        table = "public.cstatistic"
        newest = [f"(SELECT coalesce(max(rid), 0) FROM {table} WHERE cid = {origin})" for origin in self._others]
        query = "SELECT " + ", ".join(newest)
        with connection.cursor() as cursor:
            while not self._halt.wait(LOOK_EVERY_S):
                cursor.execute(query)
                row = cursor.fetchone()
                now = time.monotonic()
                for origin, rid in zip(self._others, row, strict=True):
                    self._latency.visible(origin, self._cid, int(rid), now)
