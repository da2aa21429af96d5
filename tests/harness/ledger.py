"""A ledger of every write that clients tried, on all nodes at once, and what it says about the cluster afterwards.

Each node has a client that goes on writing whatever happens: configuration (a mirrored table, which only the master may
write) and mail (an owned one, which every node may). A write is *acknowledged* when the commit returned, *refused* when
the server said no, and *unknown* when the connection was lost before either.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psycopg2

from pmgsync.core.document import Epoch
from tests.harness.cluster import Cluster, Node

PROFILE = """name = "ledger"
sequences = true
[tables.configuration]
policy = "mirror"
[tables.mail]
policy = "owned"
owner = "cid"
"""
SCHEMA = """
CREATE TABLE configuration (id bigserial PRIMARY KEY, key text NOT NULL UNIQUE, told text NOT NULL DEFAULT '');
CREATE TABLE mail (cid int NOT NULL, rid bigint NOT NULL, key text NOT NULL, PRIMARY KEY (cid, rid));
"""
TABLES = ("configuration", "mail")
_WHERE = "RETURNING (pg_current_wal_insert_lsn() - '0/0')::bigint"
_CONFIGURE = f"INSERT INTO configuration (key) VALUES (%(key)s) {_WHERE}"
_MAIL = f"INSERT INTO mail (cid, rid, key) VALUES (%(cid)s, %(number)s, %(key)s) {_WHERE}"
CONNECT_S = 2


def write_profile(directory: Path) -> str:
    """Write the profile of these tables; returns its path, for node.toml."""
    path = directory / "ledger.toml"
    path.write_text(PROFILE)
    return str(path)


class Outcome(Enum):
    """What the client was told."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Write:
    """One write; times are seconds since 1970: all nodes under test share one clock.

    Attributes:
        lsn: where its server's WAL was before its commit, 0 when it was not told.
    """

    cid: int
    table: str
    key: str
    begun: float
    ended: float
    outcome: Outcome
    said: str = ""
    lsn: int = 0


class Ledger:
    """What the clients of all nodes wrote; `with` runs a client for each table on each node."""

    def __init__(self, cluster: Cluster, *, pause_s: float = 0.01, busy: Iterable[int] = ()) -> None:
        """Prepare.

        Args:
            busy: CIDs whose clients write without a pause.
        """
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.writes: list[Write] = []
        self._clients = [
            threading.Thread(target=self._run, args=(node, cid, table, 0.0 if cid in busy else pause_s), daemon=True)
            for cid, node in enumerate(cluster.nodes, 1)
            for table in TABLES
        ]

    def __enter__(self) -> Ledger:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the clients."""
        self._stop.set()
        for client in self._clients:
            client.join(60)
            assert not client.is_alive(), "a client hangs"

    def _run(self, node: Node, cid: int, table: str, pause_s: float) -> None:
        connection: psycopg2.extensions.connection | None = None
        number = 0
        statement = _CONFIGURE if table == "configuration" else _MAIL
        while not self._stop.is_set():
            if connection is None or connection.closed:
                try:
                    connection = psycopg2.connect(node.server.dsn(node.dbname, connect_timeout=CONNECT_S))
                except psycopg2.Error:
                    time.sleep(0.05)
                    continue
            number += 1
            key = f"{table}-{cid}-{number}"
            begun, lsn = time.time(), 0
            try:
                with connection, connection.cursor() as cursor:
                    cursor.execute(statement, {"cid": cid, "number": number, "key": key})
                    ((lsn,),) = cursor.fetchall()
                outcome, said = Outcome.ACKNOWLEDGED, ""
            except psycopg2.Error as error:
                lost = isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)) and (
                    connection.closed or not error.pgcode or error.pgcode.startswith("57P")
                )
                outcome, said = Outcome.UNKNOWN if lost else Outcome.REFUSED, f"{error.pgcode} {error}".strip()
                if lost:
                    connection.close()
            with self._lock:
                self.writes.append(Write(cid, table, key, begun, time.time(), outcome, said, lsn))
            time.sleep(pause_s if outcome is Outcome.ACKNOWLEDGED else 0.02)
        if connection is not None:
            connection.close()

    # -- what it says -------------------------------------------------------------------------------------------------

    def of(self, table: str, outcome: Outcome, cid: int | None = None) -> list[Write]:
        """Return the writes to a table with an outcome, of one node or of all, in the order of their end."""
        with self._lock:
            found = [
                write
                for write in self.writes
                if write.table == table and write.outcome is outcome and cid in {None, write.cid}
            ]
        return sorted(found, key=lambda write: write.ended)

    def acknowledged_since(self, cid: int, since: float) -> bool:
        """True when a node has taken configuration in a write that began after an instant."""
        return any(write.begun > since for write in self.of("configuration", Outcome.ACKNOWLEDGED, cid))

    def gap_s(self, since: float) -> float:
        """Return the longest time, from an instant on, in which no node acknowledged configuration."""
        ended = [write.ended for write in self.of("configuration", Outcome.ACKNOWLEDGED) if write.ended > since]
        times = [since, *ended]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=float("inf"))


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the writes.

    Attributes:
        exported: acknowledged, and in a divergence file instead of the tables.
        lost: acknowledged, and nowhere.
    """

    acknowledged: int
    refused: int
    unknown: int
    exported: int
    lost: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {self.refused} refused, {self.unknown} unknown, "
            f"{self.exported} exported, {len(self.lost)} lost"
        )


def balance(cluster: Cluster, ledger: Ledger, exported: set[str], *, gone: Collection[int] = ()) -> Account:
    """Compare the ledger with what every node has, after everything was applied everywhere.

    Args:
        exported: keys of configuration in the divergence files of all nodes.
        gone: CIDs of nodes whose disks are gone: of their mail some may be lost.

    Raises:
        AssertionError: when nodes differ, other mail was lost or refused, or what was refused is there.
    """
    cluster.assert_equal(TABLES)
    kept = {table: set(cluster.nodes[0].content(table, "key")) for table in TABLES}
    kept = {table: {row.strip("()") for row in rows} for table, rows in kept.items()}
    refused_mail = ledger.of("mail", Outcome.REFUSED)
    assert not refused_mail, f"mail was refused: {refused_mail[0]}"
    mail = [write for write in ledger.of("mail", Outcome.ACKNOWLEDGED) if write.cid not in gone]
    lost_mail = [write for write in mail if write.key not in kept["mail"]]
    assert not lost_mail, f"{len(lost_mail)} mails were lost, the first: {lost_mail[0]}"
    refused = ledger.of("configuration", Outcome.REFUSED)
    there = [write for write in refused if write.key in kept["configuration"] | exported]
    assert not there, f"what was refused is there: {there[0]}"
    acknowledged = ledger.of("configuration", Outcome.ACKNOWLEDGED)
    both = kept["configuration"] & exported
    assert not both, f"in the tables and in a divergence file: {sorted(both)[:5]}"
    lost = tuple(write.key for write in acknowledged if write.key not in kept["configuration"] | exported)
    return Account(
        len(acknowledged),
        len(refused),
        len(ledger.of("configuration", Outcome.UNKNOWN)),
        sum(write.key in exported for write in acknowledged),
        lost,
    )


def assert_one_master(cluster: Cluster, ledger: Ledger, history: Sequence[Epoch], *, fenced: bool) -> None:
    """Check that nothing counts that a node acknowledged after another's epoch began.

    Args:
        history: the epochs of the document that all nodes hold at the end.
        fenced: then nothing may even have been acknowledged.

    Raises:
        AssertionError: when something does.
    """
    kept = {row.strip("()") for row in cluster.nodes[0].content("configuration", "key")}
    acknowledged = ledger.of("configuration", Outcome.ACKNOWLEDGED)
    for number, entry in enumerate(history[1:], 1):
        begun = entry.when / 1e6
        until = history[number + 1].when / 1e6 if number + 1 < len(history) else float("inf")
        for write in acknowledged:
            if write.cid != entry.master and begun < write.begun < until:
                assert write.key not in kept, f"{write} counts, but CID {entry.master} was master since {begun}"
                assert not fenced, f"{write} was acknowledged, but CID {entry.master} was master since {begun}"
