"""Workloads and their witnesses: money that never changes in sum, and markers that never skip."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import psycopg2

from tests.harness.cluster import Node
from tests.harness.schema import ACCOUNTS, BANK_SCHEMA, BANK_TABLES, TOTAL


class Stoppable:
    """A thread that repeats something until it is stopped, and shows its first error then."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._step()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """End the thread and raise what it met."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a workload thread hangs"
        if self._error is not None:
            raise self._error


class Bank:
    """Transfers on one node, each with a marker in the same transaction; some are rolled back, some are large."""

    def __init__(self, node: Node, seed: int, *, pause_s: float = 0.002) -> None:
        self.node = node
        self.committed = 0
        self.refused = 0
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._next = 1
        self._connection: psycopg2.extensions.connection | None = None

    def step(self) -> None:
        """Do one transaction; a server that is away is waited for."""
        try:
            if self._connection is None:
                self._connection = psycopg2.connect(self.node.server.dsn(self.node.dbname, connect_timeout=5))
                self._resume()
            self._transact(self._connection)
        except psycopg2.Error:
            self.refused += 1
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            time.sleep(0.1)
        time.sleep(self._pause_s)

    def _resume(self) -> None:
        assert self._connection is not None
        with self._connection, self._connection.cursor() as cursor:
            # A commit whose answer was lost may have happened.
            cursor.execute("SELECT coalesce(max(id), 0) + 1 FROM marker")
            self._next = cursor.fetchone()[0]  # type: ignore[index]

    def _transact(self, connection: psycopg2.extensions.connection) -> None:
        pick = self._random
        source, target = pick.sample(range(1, ACCOUNTS + 1), 2)
        amount, rows = pick.randint(1, 50), 3000 if pick.random() < 0.01 else pick.randint(0, 3)
        with connection.cursor() as cursor:
            cursor.execute("UPDATE account SET balance = balance - %s WHERE id = %s", (amount, source))
            if rows:
                cursor.execute(
                    "INSERT INTO loose SELECT mod(g, 7), repeat('x', 30) FROM generate_series(1, %s) AS g", (rows,)
                )
            if pick.random() < 0.2:
                cursor.execute("DELETE FROM loose WHERE ctid IN (SELECT ctid FROM loose LIMIT 5)")
            cursor.execute("UPDATE account SET balance = balance + %s WHERE id = %s", (amount, target))
            cursor.execute("INSERT INTO marker VALUES (%s, %s)", (self._next, f"{source}>{target}"))
        if pick.random() < 0.1:
            connection.rollback()
            return
        connection.commit()
        self._next += 1
        self.committed += 1


class Witness:
    """Reads a slave throughout, in REPEATABLE READ: the sum of all balances, and markers without a gap."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.looks = 0
        self._newest = 0
        self._connection: psycopg2.extensions.connection | None = None

    def step(self) -> None:
        """Look once; a server that is away is no evidence.

        Raises:
            AssertionError: when a transaction was seen in part, out of order, with a gap, or was taken back.
        """
        try:
            if self._connection is None:
                self._connection = psycopg2.connect(self.node.server.dsn(self.node.dbname, connect_timeout=5))
                self._connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
            with self._connection, self._connection.cursor() as cursor:
                cursor.execute("SELECT count(*), sum(balance) FROM account")
                accounts, total = cursor.fetchone()  # type: ignore[misc]
                cursor.execute("SELECT count(*), coalesce(max(id), 0) FROM marker")
                count, newest = cursor.fetchone()  # type: ignore[misc]
        except psycopg2.Error:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            time.sleep(0.1)
            return
        assert (accounts, total) == (ACCOUNTS, TOTAL), f"a transfer was seen in part: {accounts} accounts, {total}"
        assert count == newest, f"markers have a gap: {count} of {newest}"
        assert newest >= self._newest, f"markers went back from {self._newest} to {newest}"
        self._newest = newest
        self.looks += 1
        time.sleep(0.01)


__all__ = ["BANK_SCHEMA", "BANK_TABLES", "Bank", "Stoppable", "Witness"]
