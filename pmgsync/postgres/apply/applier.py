"""The applier of one origin: takes the frames of its chain and commits their transactions, in order, each once.

Invariant: what is committed here is a prefix of the chain, and pmgsync.position, written by the same transactions, says
which. So whatever ends a transaction early, the next applier goes on where this one stood.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.frames import Frame, is_part, unpack_body
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import Change, Piece, Relation, transactions
from pmgsync.core.positions import LAST, Position, format_lsn, parse_lsn
from pmgsync.core.profile import Profile
from pmgsync.errors import ApplyError, PmgsyncError, ProtocolError, ResyncRequiredError, TransientApplyError
from pmgsync.postgres.apply import tending
from pmgsync.postgres.apply.bulk import BulkExecutor
from pmgsync.postgres.apply.durability import commit_setting, make_durable
from pmgsync.postgres.apply.failures import apply_error, is_drift, one_line
from pmgsync.postgres.apply.plan import ApplyStats, Item, NoteItem, PlannedTransaction, SchemaItem
from pmgsync.postgres.apply.planner import Planner
from pmgsync.postgres.apply.rows import RowExecutor
from pmgsync.postgres.apply.stale import StaleTable, StaleTables, TableName
from pmgsync.postgres.replication_origin import take_origin
from pmgsync.postgres.session import connect, rows

log = logging.getLogger(__name__)

PREDECESSOR_S = 3.0
"""Seconds that a session of the same origin is given to end."""
GROUP_CHANGES = 20_000
"""Row changes of small transactions that go into one local transaction at most."""

# One plan a statement, made without looking at values, and never a scan of the table where an index serves: statistics
# may be older than the rows that just came in. JIT would take the disabled scan's cost for a reason to compile.
_SESSION = b"""
SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET jit = off; SET client_min_messages = notice"""


@dataclass(slots=True)
class _Half:
    """A large transaction whose parts are executed, not committed."""

    lsn: int
    attempt: int
    part: int
    changes: int


class _Notices:
    """Stands in for psycopg2's list of notices, which keeps only the newest 50."""

    def __init__(self) -> None:
        self.missing = 0
        self.lost: list[str] = []

    def clear(self) -> None:
        """Forget what was told in a transaction that is over."""
        self.missing = 0
        self.lost.clear()

    def append(self, text: str) -> None:
        """Take a notice of the server's."""
        if "pmgsync missing " in text:
            self.missing += 1
        elif "pmgsync lost " in text:
            self.lost.append(text.partition("pmgsync lost ")[2].partition("\n")[0])


class _DriftError(Exception):
    """A row does not fit its table here because the table is another than on the origin."""

    def __init__(self, relation: Relation, reason: str) -> None:
        super().__init__(reason)
        self.relation = relation
        self.reason = reason


class Applier:
    """Applies one origin's chain to the local database. For one thread; only `cancel` may be called from another.

    Args:
        dsn: of the local database.
        origin: CID of the node whose chain it is.
        own_cid: CID of this node.
        master: returns the master's CID, asked at every `apply`.
        members: returns all members' CIDs.
        stale: what is known of stale tables, when it is to outlive this object.
        waits: True: a commit waits for the disk; False: it is visible before, and `flush` makes it durable.

    Attributes:
        stats: counters, of this object's life.
        position: the newest complete position that is committed here, and can be read.
        durable: the newest that a crash of the server cannot take back.
        origin: CID of the node whose chain it is.
        failures: sentences on changes of the schema that could not be repeated; replaced as a whole.
    """

    def __init__(
        self,
        dsn: str,
        profile: Profile,
        *,
        origin: int,
        own_cid: int,
        master: Callable[[], int],
        members: Callable[[], Collection[int]],
        stale: StaleTables | None = None,
        waits: bool = True,
    ) -> None:
        assert origin != own_cid  # a node's own chain comes back to it only by a fault
        self._dsn = dsn
        self._profile = profile
        self.origin = self._origin = origin
        self._master = master
        self._members = members
        self.stats = ApplyStats()
        self._trimmed = 0
        self._connection: Connection | None = None
        self._incarnation = 0
        self._waits = waits
        self.position = Position(0, LAST)
        self._durable = Position(0, LAST)
        self._half: _Half | None = None
        self.failures: list[str] = []
        self._notices = _Notices()
        self.stale = stale or StaleTables(origin)
        self._planner = Planner(profile, self.stats, self.stale)
        self._rows = RowExecutor(origin, self.stats, self.stale)
        self._bulk = BulkExecutor(self._rows)

    # -- the session

    def connect(self) -> tuple[int, Position] | None:
        """Open the session and return what the database says of this chain: incarnation and position; None: nothing.

        Raises:
            UnreachableError: when the server does not let the session in.
            TransientApplyError: when another session still applies this chain.
            ApplyError: when the database is not set up.
        """
        self.close()
        connection = connect(self._dsn, application_name=f"pmgsync apply {self._origin}", replica=True)
        connection.autocommit = True
        self._notices = _Notices()
        connection.notices = self._notices  # type: ignore[assignment]
        self._connection = connection
        self._planner = Planner(self._profile, self.stats, self.stale)
        self._rows = RowExecutor(self._origin, self.stats, self.stale)
        self._bulk = BulkExecutor(self._rows)
        try:
            with connection.cursor() as cursor:
                cursor.execute(_SESSION)
                cursor.execute(commit_setting(waits=self._waits))
                # Marks what is written here as not this node's own, so that capture does not send it again. A second
                # session of the same origin is refused, so there is one applier a chain.
                take_origin(cursor, self._origin, patience_s=PREDECESSOR_S)
                self.stale.load(cursor)
                self.failures = tending.schema_failures(cursor, self._origin)
                cursor.execute(
                    b"SELECT incarnation, lsn::text, part FROM pmgsync.position WHERE origin = %d" % self._origin
                )
                found = rows(cursor)
                # Another session may have committed it an instant ago, without waiting.
                make_durable(cursor)
        except psycopg2.Error as error:
            self.close()
            raise self._failed(error, "", 0) from error
        if not found:
            self._incarnation, self.position = 0, Position(0, LAST)
            self._durable = self.position
            return None
        incarnation, lsn, part = found[0]
        assert incarnation is not None and lsn is not None and part is not None
        self._incarnation, self.position = int(incarnation), Position(parse_lsn(lsn.decode()), int(part))
        self._durable = self.position
        return self._incarnation, self.position

    def begin_chain(self, incarnation: int, position: Position) -> None:
        """Begin to follow a chain, or a new incarnation of one, at a position that this database is known to have.

        Raises:
            ApplyError: when the database does not take it.
        """
        assert position.complete
        with self._session() as cursor:
            try:
                cursor.execute(
                    b"INSERT INTO pmgsync.position (origin, incarnation, lsn, part) VALUES (%d, %d, '%s', %d) "
                    b"ON CONFLICT (origin) DO UPDATE SET incarnation = EXCLUDED.incarnation, lsn = EXCLUDED.lsn, "
                    b"part = EXCLUDED.part, commit_time = NULL"
                    % (self._origin, incarnation, format_lsn(position.lsn).encode(), position.part)
                )
            except psycopg2.Error as error:
                raise self._failed(error, "", position.lsn) from error
        self._incarnation, self.position = incarnation, position
        self.flush()

    @property
    def durable(self) -> Position:
        """The newest position that a crash of the server cannot take back."""
        return self.position if self._waits else self._durable

    def flush(self) -> None:
        """Make what was committed durable; not while a large transaction is half in, whose commit comes later.

        Raises:
            TransientApplyError: when the server does not answer.
        """
        if self.durable == self.position or self._half is not None:
            return
        with self._session() as cursor:
            try:
                make_durable(cursor)
            except psycopg2.Error as error:
                raise self._failed(error, "", self.position.lsn) from error
        self._durable = self.position

    def close(self) -> None:
        """End the session; a half transaction is rolled back by the server."""
        connection, self._connection, self._half = self._connection, None, None
        if connection is not None:
            connection.close()

    def cancel(self) -> None:
        """End the statement that is being executed, from another thread; `apply` raises TransientApplyError."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(psycopg2.Error):
                connection.cancel()

    def abandon(self) -> None:
        """Drop the parts of a half transaction."""
        if self._half is not None:
            self._half = None
            self._rollback()

    # -- frames

    def apply(self, frames: Sequence[Frame]) -> Position:
        """Apply what follows the position, and return the newest complete position that is committed.

        Frames may overlap with what is in already. Parts of a large transaction are executed at once and committed with
        the last one.

        Raises:
            ResyncRequiredError: when a frame is of another incarnation.
            ProtocolError: when a frame cannot be read, or leaves a gap.
            TransientApplyError: when repeating may help.
            ApplyError: when the chain cannot go on. What precedes the transaction named is committed.
            UnreachableError: when the session was lost and there is no new one.
        """
        if self._connection is None or self._connection.closed:
            self.connect()
        self._planner.set_writers(Writers.at(self._origin, self._master(), self._members()))
        group: list[PlannedTransaction] = []
        reached, changes = self.position, 0
        try:
            for frame in frames:
                self._check(frame)
                if frame.here <= reached:
                    continue
                if is_part(frame.header):
                    self._commit_group(group, reached)
                    group, changes = [], 0
                    self._take_part(frame)
                    reached = self.position
                    continue
                if frame.prev > reached:
                    raise ProtocolError(f"a frame of origin {self._origin} follows {frame.prev}, here is {reached}")
                self.abandon()
                for piece in transactions(unpack_body(frame.body)):
                    if piece.begin is None or piece.commit is None:
                        raise ProtocolError("a frame of whole transactions holds a part of one")
                    lsn = piece.commit.commit_lsn
                    if lsn <= reached.lsn:
                        continue
                    if lsn > frame.here.lsn:
                        raise ProtocolError(f"a frame that ends at {frame.here} holds a transaction beyond its end")
                    try:
                        with self._session() as cursor:
                            items, rest = self._planner.plan(cursor, piece.changes, lsn)
                    except PmgsyncError:
                        # What precedes it must not wait until it can be applied.
                        self._commit_group(group, reached)
                        raise
                    planned = PlannedTransaction(lsn, piece.commit.commit_time_us, items)
                    alone = bool(items) and type(items[-1]) is SchemaItem
                    if not alone:
                        group.append(planned)
                        reached = Position(lsn, LAST)
                        changes += len(items)
                    if alone or changes > GROUP_CHANGES:
                        self._commit_group(group, reached)
                        group, changes = [], 0
                    if alone:
                        self._commit_steps(planned, rest)
                        reached = self.position
                reached = max(reached, frame.here)
            self._commit_group(group, reached)
        except PmgsyncError:
            self._recover()
            raise
        except psycopg2.Error as error:
            self._recover()
            raise self._failed(error, "", reached.lsn) from error
        return self.position

    def _check(self, frame: Frame) -> None:
        header = frame.header
        if header.origin != self._origin:
            raise ProtocolError(f"a frame of origin {header.origin} came to the applier of origin {self._origin}")
        if header.incarnation != self._incarnation:
            raise ResyncRequiredError(
                f"the chain of origin {self._origin} was begun anew, this database has its incarnation "
                f"{self._incarnation:016x}, the frame is of {header.incarnation:016x}",
                hint="nothing need be done: a snapshot is taken",
            )

    # -- small transactions

    def _commit_group(self, group: list[PlannedTransaction], reached: Position) -> None:
        if reached == self.position:
            return
        if not self._committed_at_once(group, reached):
            for planned in group:
                self._commit_one(planned)
            if reached > self.position:
                self._commit_group([], reached)
            return
        self.position = reached
        self._count_notices()
        self.stats.transactions += len(group)
        self.stats.rows += sum(planned.changes for planned in group)

    def _committed_at_once(self, group: list[PlannedTransaction], reached: Position) -> bool:
        """Commit a group in one local transaction; False when that did not go as planned, and nothing is done."""
        when = group[-1].commit_time if group else None
        for executor in (self._bulk, self._rows):
            script = [b"BEGIN"]
            try:
                with self._session() as cursor:
                    self._rows.begin()
                    self._notices.clear()
                    executor.batch(cursor, [item for planned in group for item in planned.items], script)
                    self._finish(cursor, script, reached, when)
            except (psycopg2.Error, ApplyError, ProtocolError) as error:
                self._raise_transient(error, reached.lsn)
                if not group:
                    raise
                self._recover()
                log.info("action=repeat origin=%d position=%s reason=%s", self._origin, self.position, one_line(error))
                self.stats.repeats += 1
                self._bulk.failed()
                with self._session() as cursor:
                    for planned in group:
                        self._planner.renew(cursor, planned.items, planned.lsn)
            else:
                return True
        return False

    def _commit_one(self, planned: PlannedTransaction) -> None:
        """Apply one transaction, row by row: exactly what the origin did, or the real error."""
        with self._session() as cursor:
            while True:
                self._rows.begin()
                self._notices.clear()
                cursor.execute(b"BEGIN")
                self._planner.renew(cursor, planned.items, planned.lsn)
                try:
                    self._one_by_one(cursor, planned)
                except _DriftError as drift:
                    self._recover()
                    self._leave_out(planned, drift)
                else:
                    break
            reached = Position(planned.lsn, LAST)
            try:
                self._finish(cursor, [], reached, planned.commit_time)
            except psycopg2.Error as error:
                raise self._failed(error, "", planned.lsn) from error
        self.position = reached
        self._count_notices()
        self.stats.transactions += 1
        self.stats.rows += planned.changes

    def _one_by_one(self, cursor: Cursor, planned: PlannedTransaction) -> None:
        for item in planned.items:
            try:
                self._rows.one(cursor, item, planned.lsn)
            except psycopg2.Error as error:
                target = getattr(item, "target", None) or next(iter(getattr(item, "targets", ())), None)
                if isinstance(item, Item) and is_drift(error, differs=item.target.differs):
                    raise _DriftError(item.target.relation, one_line(error)) from error
                name = target.relation.qualified if target is not None else ""
                raise self._failed(error, name, planned.lsn) from error

    def _leave_out(self, planned: PlannedTransaction, drift: _DriftError) -> None:
        relation = drift.relation
        reason = f"its rows do not fit the table here ({drift.reason})"
        table = StaleTable(relation.namespace, relation.name, "table", reason, lsn=planned.lsn)
        planned.items.insert(0, NoteItem(stale=self.stale.note(table)))

    def _finish(self, cursor: Cursor, script: list[bytes], reached: Position, commit_time: int | None) -> None:
        """Move the position and commit, in one round trip with what is left of the script."""
        when = b"commit_time"
        if commit_time is not None:
            when = b"'epoch'::timestamptz + interval '%d us'" % commit_time
        script.append(
            b"WITH hit AS (UPDATE pmgsync.position SET lsn = '%s', part = %d, commit_time = %s "
            b"WHERE origin = %d AND incarnation = %d AND lsn = '%s' RETURNING 1) "
            b"SELECT pmgsync.diverged() FROM hit HAVING pg_catalog.count(*) <> 1"
            % (
                format_lsn(reached.lsn).encode(), reached.part, when,
                self._origin, self._incarnation, format_lsn(self.position.lsn).encode(),
            )
        )  # fmt: skip
        script.append(b"COMMIT")
        self._rows.send(cursor, script)

    # -- in steps: large transactions, and such that change the schema

    def _commit_steps(self, planned: PlannedTransaction, rest: Sequence[Change]) -> None:
        """Apply a transaction of which not everything can be planned at once."""
        with self._session() as cursor:
            cursor.execute(b"BEGIN")
            self._rows.begin()
            self._notices.clear()
            changes = self._execute_steps(cursor, planned, rest)
            try:
                self._finish(cursor, [], Position(planned.lsn, LAST), planned.commit_time)
            except psycopg2.Error as error:
                raise self._failed(error, "", planned.lsn) from error
        self.position = Position(planned.lsn, LAST)
        self._count_notices()
        self.stats.transactions += 1
        self.stats.rows += changes

    def _take_part(self, frame: Frame) -> None:
        header, half = frame.header, self._half
        if header.prev.complete:
            if header.prev > self.position:
                raise ProtocolError(f"a frame of origin {self._origin} follows {header.prev}, here is {self.position}")
            self.abandon()
            half = None
        elif half is None or half.lsn != header.here.lsn or half.attempt != header.attempt:
            # Of another run of capture than the parts in hand. It is begun again at its first part.
            self.abandon()
            return
        elif header.here.part <= half.part:
            return
        elif header.prev.part != half.part:
            raise ProtocolError(f"a part of origin {self._origin} follows {header.prev}, here is part {half.part}")
        pieces = list(transactions(unpack_body(frame.body)))
        if len(pieces) > 1 or (pieces and (pieces[0].begin is None) != (half is not None)):
            raise ProtocolError("a part of a transaction holds something else")
        piece = pieces[0] if pieces else Piece(None, [], None)
        if (piece.commit is not None) != header.here.complete:
            raise ProtocolError("a transaction's last part has no Commit, or another part has one")
        lsn = header.here.lsn
        with self._session() as cursor:
            if half is None:
                cursor.execute(b"BEGIN")
                self._rows.begin()
                self._notices.clear()
                half = self._half = _Half(lsn, header.attempt, 0, 0)
            items, rest = self._planner.plan(cursor, piece.changes, lsn)
            changes = self._execute_steps(cursor, PlannedTransaction(lsn, header.commit_time, items), rest)
            half.part, half.changes = header.here.part, half.changes + changes
            if piece.commit is None:
                return
            try:
                self._finish(cursor, [], header.here, piece.commit.commit_time_us)
            except psycopg2.Error as error:
                raise self._failed(error, "", lsn) from error
        self._half = None
        self.position = header.here
        self.stats.transactions += 1
        self.stats.rows += half.changes
        self._count_notices()

    def _count_notices(self) -> None:
        self.stats.missing += self._notices.missing
        self._rows.count_lost(self._notices.lost)
        self._notices.clear()

    def _execute_steps(self, cursor: Cursor, planned: PlannedTransaction, rest: Sequence[Change]) -> int:
        """Execute what is planned in the open transaction, then the rest; returns how many changes it were."""
        changes = 0
        while True:
            self._execute_part(cursor, planned)
            changes += planned.changes
            if planned.items and type(planned.items[-1]) is SchemaItem:
                self._planner.forget()
            if not rest:
                return changes
            items, rest = self._planner.plan(cursor, rest, planned.lsn)
            planned = PlannedTransaction(planned.lsn, planned.commit_time, items)

    def _execute_part(self, cursor: Cursor, planned: PlannedTransaction) -> None:
        """Execute a part in the open transaction; under a savepoint, for earlier parts are not at hand any more."""
        missing, lost = self._notices.missing, len(self._notices.lost)
        script: list[bytes] = []
        cursor.execute(b"SAVEPOINT part")
        try:
            self._bulk.batch(cursor, planned.items, script)
            script.append(b"RELEASE SAVEPOINT part")
            self._rows.send(cursor, script)
        except (psycopg2.Error, ApplyError, ProtocolError) as error:
            self._raise_transient(error, planned.lsn)
            self.stats.repeats += 1
            while True:
                cursor.execute(b"ROLLBACK TO SAVEPOINT part")
                self._notices.missing = missing
                del self._notices.lost[lost:]
                # Locks taken since the savepoint are gone.
                self._rows.begin()
                self._planner.forget()
                self._rows.forget(cursor)
                self._planner.renew(cursor, planned.items, planned.lsn)
                try:
                    self._one_by_one(cursor, planned)
                except _DriftError as drift:
                    # What the earlier parts did to the table goes when it is fetched anew.
                    self._leave_out(planned, drift)
                else:
                    break
            cursor.execute(b"RELEASE SAVEPOINT part")

    # -- stale tables

    def tend(self) -> list[TableName]:
        """Return the stale tables that can be fetched anew now; to be called every few seconds, between two `apply`.

        Rows that were merged into something that their origin may not know are published again meanwhile.

        Raises:
            ApplyError: when the database does not answer as it should.
            UnreachableError: when the session was lost.
        """
        if self._half is not None:
            return []
        try:
            with self._session() as cursor:
                self._trimmed = tending.trim_conflicts(cursor, self._origin, self._trimmed, self.stats.conflicts)
                repairing = tending.repairs_wait(cursor, self._origin)
                self.failures = tending.schema_failures(cursor, self._origin)
                self.stale.sweep(cursor, self.position.lsn)
                found: dict[TableName, object] = {}
                for table in self.stale.waiting():
                    newest = self.stale.newest.get(table.key)
                    rule = None if newest is None else self._planner.rule(newest)
                    signature = tending.agreed(cursor, table, newest, rule)
                    if signature is not None and self.stale.due(table.key, signature):
                        found[table.key] = signature
        except psycopg2.Error as error:
            raise self._failed(error, "", 0) from error
        if repairing:
            tending.republish(self._dsn, self._origin)
        self.stale.tried(found, found)
        return list(found)

    # -- errors

    def _session(self) -> Cursor:
        if self._connection is None:
            raise TransientApplyError("the session on the local database is closed")
        return self._connection.cursor()

    def _recover(self) -> None:
        """Roll back whatever is open and drop what was known of tables. A session that does not answer is closed."""
        self._half = None
        self._planner.forget()
        connection = self._connection
        if connection is None:
            return
        try:
            self._rollback()
            with connection.cursor() as cursor:
                self._rows.forget(cursor)
        except psycopg2.Error:
            self.close()

    def _rollback(self) -> None:
        with self._session() as cursor:
            cursor.execute(b"ROLLBACK")
            self.stale.load(cursor)

    def _raise_transient(self, error: Exception, lsn: int) -> None:
        """Raise when the error is one that row by row would meet again, or that says nothing of the rows."""
        if isinstance(error, psycopg2.Error):
            failed = self._failed(error, "", lsn)
            if isinstance(failed, TransientApplyError):
                raise failed from error
        if isinstance(error, TransientApplyError | ProtocolError):
            raise error

    def _failed(self, error: psycopg2.Error, table: str, lsn: int) -> ApplyError:
        return apply_error(error, origin=self._origin, table=table, lsn=lsn)
