"""The demo's load: mail on every node, greylisting and preferences on every node, rule changes on the master."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from cli.demo.trees import mail_file

if TYPE_CHECKING:
    from cli.demo.latency import Latency
    from cli.demo.machine import DemoNode

QUARANTINE_EVERY = 4
"""Every so many mails one is quarantined."""
GREYLIST_EVERY = 3
PREFERENCE_EVERY = 10
USERS = 200
RULES_PER_S = 2.0
HISTORY_MAILS = 5_000
FIRST_RID = 100_001
"""Beyond the mails of the history, on every node."""
WRITER_NUMBERS = 10_000_000
"""The next writer's numbers begin so far on."""

# SQL_ASCII databases hold whatever bytes mail brings along; this sender is Latin-1.
_SENDER = r"E'm\xfcller{user}@example.org'"
_MAIL = (
    "INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, virusinfo, ptime, sender) "
    "VALUES ({cid}, {rid}, {now}, {size}, {inbound}, {level}, NULL, {ptime}, {sender});"
)
_RECEIVER = (
    "INSERT INTO creceivers (cstatistic_cid, cstatistic_rid, receiver, blocked) "
    "VALUES ({cid}, {rid}, 'user{to}@example.com', {blocked});"
)
_STORED = (
    "INSERT INTO cmailstore (cid, rid, time, qtype, bytes, spamlevel, info, sender, header, file) "
    "VALUES ({cid}, {rid}, {now}, 'S', {size}, {level}, 'demo', {sender}, "
    "repeat('X-Header: {rid}' || chr(10), {lines}), 'cluster/{cid}/spam/{rid}');"
)
_STORED_RECEIVER = (
    "INSERT INTO cmsreceivers (cmailstore_cid, cmailstore_rid, pmail, receiver, ticketid, status, mtime) "
    "VALUES ({cid}, {rid}, 'user{to}@example.com', 'user{to}@example.com', {ticket}, 'N', {now});"
)
_GREYLIST = (
    "INSERT INTO cgreylist (ipnet, sender, receiver, instance, rctime, extime, delay, blocked, passed, cid, mtime) "
    "VALUES ('192.0.{cid}.{user}', {sender}, 'user{to}@example.com', 'demo', "
    "{now}, {now} + 3600, 0, 1, 0, {cid}, {now}) "
    "ON CONFLICT (ipnet, sender, receiver) DO UPDATE SET blocked = cgreylist.blocked + 1, "
    "extime = greatest(cgreylist.extime, excluded.extime), mtime = excluded.mtime;"
)
_PREFERENCE = (
    "INSERT INTO userprefs (pmail, name, data, mtime) "
    "VALUES ('user{to}@node{cid}.example.com', 'WL', 'list {rid} of {cid}', {now}) "
    "ON CONFLICT (pmail, name) DO UPDATE SET data = excluded.data, mtime = excluded.mtime "
    "WHERE userprefs.mtime <= excluded.mtime;"
)
_RULE = (
    "WITH made AS (INSERT INTO rule (name, priority, active, direction) "
    "VALUES ('demo rule {number}', {priority}, 1, 2) RETURNING id), "
    "grouped AS (INSERT INTO objectgroup (name, info, class) "
    "VALUES ('demo group {number}', 'made by the demo', 'who') RETURNING id), "
    "held AS (INSERT INTO object (objecttype, objectgroup_id, value) "
    "SELECT 1000, id, '\\x00ff{number:08x}'::bytea FROM grouped RETURNING id), "
    "noted AS (INSERT INTO attribut (object_id, name, value) SELECT id, 'demo', '\\x00'::bytea FROM held) "
    "INSERT INTO rulegroup (objectgroup_id, rule_id, grouptype) SELECT grouped.id, made.id, 0 FROM made, grouped;"
    "UPDATE rule SET priority = priority + 1 WHERE name = 'demo rule {earlier}';"
    "DELETE FROM rulegroup WHERE rule_id IN (SELECT id FROM rule WHERE name = 'demo rule {gone}');"
    "DELETE FROM rule WHERE name = 'demo rule {gone}';"
)


_HISTORY = (
    "INSERT INTO cstatistic (cid, rid, time, bytes, direction, spamlevel, virusinfo, ptime, sender) "
    "SELECT 0, n, 1700000000 + n, 1000 + n, n % 2 = 0, n % 15, NULL, n % 3000, 'sender' || n || '@example.net' "
    f"FROM generate_series(1, {HISTORY_MAILS}) n;"
    "INSERT INTO creceivers (cstatistic_cid, cstatistic_rid, receiver, blocked) "
    f"SELECT 0, n, 'user' || n || '@example.com', n % 3 = 0 FROM generate_series(1, {HISTORY_MAILS}) n;"
)


def use_public(connection: Any) -> None:
    """Let a pinned session, which sees pg_catalog only, write table names as the gateway does."""
    with connection.cursor() as cursor:
        cursor.execute("SET search_path TO public")
    connection.commit()


def write_history(dsn: str) -> None:
    """Give the first node what a gateway has from the time before there was a cluster: its rows have CID 0."""
    from pmgsync.postgres.session import connect

    with contextlib.closing(connect(dsn, application_name="pmgcm demo")) as connection, connection.cursor() as cursor:
        use_public(connection)
        cursor.execute(_HISTORY)
        connection.commit()


def count_rules(dsn: str, first: int) -> int:
    """Return how many changes of a rule writer, whose first number was `first`, a node has.

    Each change makes a rule that a later one deletes, so it is the newest that counts.
    """
    from pmgsync.postgres.session import connect

    with contextlib.closing(connect(dsn, application_name="pmgcm demo")) as connection, connection.cursor() as cursor:
        use_public(connection)
        number = "substring(name FROM '^demo rule ([0-9]+)$')::bigint"
        cursor.execute(
            f"SELECT max({number}) FROM rule WHERE {number} BETWEEN %s AND %s", (first, first + WRITER_NUMBERS - 1)
        )
        row = cursor.fetchone()
    return 0 if row is None or row[0] is None else int(row[0]) - first + 1


def newest_mails(dsn: str) -> list[str]:
    """Return the file of each node's newest quarantined mail, as a node's database has it."""
    from pmgsync.postgres.session import connect

    with contextlib.closing(connect(dsn, application_name="pmgcm demo")) as connection, connection.cursor() as cursor:
        use_public(connection)
        cursor.execute(
            "SELECT DISTINCT ON (cid) file FROM cmailstore WHERE file LIKE 'cluster/%' ORDER BY cid, rid DESC"
        )
        return [row[0].decode() if isinstance(row[0], bytes) else row[0] for row in cursor.fetchall()]


class Writer(threading.Thread, ABC):
    """Writes transactions to one node's database at a steady rate until told to stop.

    Attributes:
        done: transactions committed.
        rows: row changes committed.
        last: when the last one was, in seconds of the monotonic clock.
        error: what ended it early, "" when nothing did.
        may_end: the node may be lost, and the writer with it.
        counts_mail: True when its transactions are mails.
    """

    counts_mail = False

    def __init__(
        self, what: str, dsn: str, cid: int, rate: float, stop: threading.Event, first: int = FIRST_RID
    ) -> None:
        """Begin; `first` is the number of its first transaction."""
        super().__init__(name=f"{what} on node {cid}", daemon=True)
        self.cid = cid
        self.first = first
        self.done = 0
        self.rows = 0
        self.last = 0.0
        self.error = ""
        self.may_end = False
        self._dsn = dsn
        self._rate = rate
        self._halt = stop
        self._random = random.Random(cid)  # noqa: S311 - the same load in every demo

    def run(self) -> None:
        from pmgsync.postgres.session import connect

        try:
            with contextlib.closing(connect(self._dsn, application_name="pmgcm demo")) as connection:
                use_public(connection)
                self._write(connection)
        except Exception as error:  # whatever it is, the demo must not call it a success
            if not self.may_end:
                self.error = f"{self.name}: {type(error).__name__}: {str(error).strip()}"

    def _write(self, connection: Any) -> None:
        begun = time.monotonic()
        with connection.cursor() as cursor:
            while not self._halt.wait(max(0.0, begun + self.done / self._rate - time.monotonic())):
                number = self.first + self.done
                statements, rows = self.transaction(number)
                cursor.execute(statements)
                connection.commit()
                self.last = time.monotonic()
                self.committed(number)
                self.done += 1
                self.rows += rows

    @abstractmethod
    def transaction(self, number: int) -> tuple[str, int]:
        """Return a transaction's statements, and how many rows they change."""

    def committed(self, number: int) -> None:
        """Called right after a transaction was committed."""


class MailWriter(Writer):
    """The mail that one gateway receives; every commit is noted, so that its way to the others can be measured."""

    counts_mail = True

    def __init__(
        self,
        node: DemoNode,
        cid: int,
        rate: float,
        stop: threading.Event,
        latency: Latency,
        first: int = FIRST_RID,
    ) -> None:
        super().__init__("mail", node.dsn, cid, rate, stop, first)
        self._node = node
        self._latency = latency

    def transaction(self, number: int) -> tuple[str, int]:
        """Return one mail's statements: statistics, quarantine, greylisting, preferences."""
        pick = self._random.randrange
        user = pick(USERS)
        values = {
            "cid": self.cid, "rid": number, "now": int(time.time()), "size": 1000 + pick(100_000),
            "inbound": bool(pick(2)), "level": pick(15), "ptime": pick(3000), "user": user,
            "sender": _SENDER.format(user=user), "lines": 10 + pick(300),
        }  # fmt: skip
        receivers = [pick(USERS) for _ in range(1 + pick(3))]
        statements = [_MAIL.format_map(values)]
        statements += [_RECEIVER.format(**values, to=to, blocked=bool(pick(2))) for to in receivers]
        if number % QUARANTINE_EVERY == 0:
            self._store(number)
            statements.append(_STORED.format_map(values))
            # The ticket is what a receiver's row is found by; a mail never has the same one twice.
            tickets = self._random.sample(range(1 << 31), len(receivers))
            statements += [
                _STORED_RECEIVER.format(**values, to=to, ticket=ticket)
                for to, ticket in zip(receivers, tickets, strict=True)
            ]
        if number % GREYLIST_EVERY == 0:
            statements.append(_GREYLIST.format(**values, to=receivers[0]))
        if number % PREFERENCE_EVERY == 0:
            statements.append(_PREFERENCE.format(**values, to=receivers[0]))
        return "".join(statements), len(statements)

    def _store(self, number: int) -> None:
        """Write a quarantined mail's file, as a gateway does before it commits the row."""
        path = mail_file(self._node, self.cid, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"Subject: demo %d of node %d\n\n" % (number, self.cid) + self._random.randbytes(20_000))

    def committed(self, number: int) -> None:
        """Start the clock of a mail."""
        self._latency.committed(self.cid, number)


class RuleWriter(Writer):
    """The administrator, who changes rules on the master."""

    def __init__(self, dsn: str, cid: int, stop: threading.Event, first: int = FIRST_RID) -> None:
        super().__init__("rules", dsn, cid, RULES_PER_S, stop, first)

    def transaction(self, number: int) -> tuple[str, int]:
        """Return one change of the rules: one made, one changed, one deleted."""
        changed = 5 + (number > self.first) + 2 * (number > self.first + 2)
        return _RULE.format(number=number, priority=50, earlier=number - 1, gone=number - 3), changed
