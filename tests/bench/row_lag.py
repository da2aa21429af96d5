"""How long rows take from one node to another while something else goes on."""

from __future__ import annotations

import threading
import time
from typing import Self

import psycopg2

from tests.bench.report import percentile
from tests.harness.cluster import Node

PAUSE_S, POLL_S, LONGEST_S = 0.05, 0.001, 60.0


class RowLag:
    """Writes a row on one node every 50 ms, and looks on another until it can be read; both connections stay open.

    Attributes:
        lags_ms: of each row, from the return of its commit.
    """

    def __init__(self, here: Node, there: Node) -> None:
        self.lags_ms: list[float] = []
        self._here, self._there = (psycopg2.connect(node.server.dsn(node.dbname)) for node in (here, there))
        self._here.autocommit = self._there.autocommit = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        with self._here.cursor() as cursor:
            cursor.execute("SELECT coalesce(max(id), 0) FROM t")
            ((self._number,),) = cursor.fetchall()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._here.close()
        self._there.close()

    def _run(self) -> None:
        with self._here.cursor() as write, self._there.cursor() as read:
            while not self._stop.wait(PAUSE_S):
                self._number += 1
                write.execute("INSERT INTO t VALUES (%s)", (self._number,))
                begun = time.monotonic()
                while time.monotonic() - begun < LONGEST_S:
                    read.execute("SELECT 1 FROM t WHERE id = %s", (self._number,))
                    if read.fetchall():
                        break
                    time.sleep(POLL_S)
                self.lags_ms.append(1000 * (time.monotonic() - begun))

    def text(self) -> str:
        """Return the figures in one line."""
        lags = self.lags_ms
        return f"{len(lags)} rows, median {percentile(lags, 0.5):.0f} ms, longest {max(lags, default=0.0):.0f} ms"
