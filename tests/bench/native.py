"""PostgreSQL's own logical replication: a publication of all tables, and a subscription in each database."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from tests.bench.processes import Processes
from tests.bench.servers import POLL_S, Servers, ask, await_mark, connect

_WORKERS = """
SELECT pid, CASE WHEN backend_type = 'walsender' THEN 'walsender'
                 WHEN backend_type LIKE '%parallel%' THEN 'parallel apply worker' ELSE 'apply worker' END
FROM pg_stat_activity
WHERE datname = 'native' AND (backend_type = 'walsender' OR backend_type LIKE 'logical replication%worker')
"""


class Native:
    """One publisher, and a database on each other server that subscribes, binary."""

    name = "native"

    def __init__(self, servers: Servers, schema: str) -> None:
        self._servers = servers
        self._schema = schema
        # A slot on the publisher is named as its subscription.
        self._subscriptions = [f"native{number}" for number in range(1, len(servers.subscribers) + 1)]
        self.publisher = servers.publisher.dsn("native")
        self.subscribers: Sequence[str] = [server.dsn("native") for server in servers.subscribers]
        self._mark = 0
        self.commit = "off"

    def start(self) -> None:
        """Make databases, publication and subscriptions, and wait until all tables are in step."""
        self._servers.create_database(self._servers.publisher, "native")
        ask(self.publisher, self._schema)
        ask(self.publisher, "CREATE PUBLICATION all_tables FOR ALL TABLES")
        for name, server in zip(self._subscriptions, self._servers.subscribers, strict=True):
            dsn = self._servers.create_database(server, "native")
            self._empty_schema(dsn)
            ask(
                dsn,
                f"CREATE SUBSCRIPTION {name} CONNECTION %s PUBLICATION all_tables WITH (binary = true)",
                (self.publisher,),
            )
        for dsn in self.subscribers:
            while ask(dsn, "SELECT 1 FROM pg_subscription_rel WHERE srsubstate <> 'r' LIMIT 1"):
                time.sleep(0.02)

    def _empty_schema(self, dsn: str) -> None:
        ask(dsn, self._schema)
        tables = ask(dsn, "SELECT quote_ident(relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 2200")
        ask(dsn, "TRUNCATE " + ", ".join(name for (name,) in tables))

    def new_mark(self) -> int:
        """Return a number for a row of `mark` that is not there yet."""
        self._mark += 1
        return self._mark

    def with_commit(self, commit: str) -> None:
        """Have the subscribers commit with this synchronous_commit from the next `resume` on."""
        self.commit = commit

    def _each(self, statement: str) -> None:
        for name, dsn in zip(self._subscriptions, self.subscribers, strict=True):
            ask(dsn, f"ALTER SUBSCRIPTION {name} {statement}")

    def settle(self) -> None:
        """Wait until everything committed so far is everywhere."""
        mark = self.new_mark()
        ask(self.publisher, "INSERT INTO mark VALUES (%s)", (mark,))
        await_mark(self.subscribers, mark)

    def pause(self) -> None:
        """Take no part while the other system is measured."""
        self._each("DISABLE")

    def resume(self) -> None:
        """Go on, and be in step when this returns."""
        self._each(f"SET (synchronous_commit = {self.commit})")
        self._each("ENABLE")
        self.settle()

    def cut(self) -> None:
        """End the connections to the publisher."""
        self._each("DISABLE")

    def captured(self, lsn: str) -> None:
        """Nothing to wait for: the WAL itself is what is sent later."""

    def mend(self) -> float:
        """Let it connect again; returns when the first connection was there (monotonic)."""
        self._each("ENABLE")
        with contextlib.closing(connect(self.publisher)) as connection, connection.cursor() as cursor:
            while True:
                cursor.execute("SELECT 1 FROM pg_stat_activity WHERE datname = 'native' AND backend_type = 'walsender'")
                if cursor.fetchone() is not None:
                    return time.monotonic()
                time.sleep(POLL_S)

    def processes(self) -> Processes:
        """Return the processes at work."""
        found: dict[int, str] = {}
        for role, server in self._servers.roles():
            found |= {pid: f"{role}: {kind}" for pid, kind in ask(server.dsn(), _WORKERS)}
        return found

    def close(self) -> None:
        """Nothing lives beside the servers."""
