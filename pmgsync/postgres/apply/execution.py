"""The execution of planned transactions: at once when all goes as planned, else row by row, which is exact.

What is planned is executed in groups of whole transactions, or, for a large one, in steps inside one transaction. A
group that fails is rolled back and each of its transactions done by itself; only what fails then is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.changes import Change, Unread
from pmgsync.core.pgoutput import Relation
from pmgsync.core.positions import LAST, Position
from pmgsync.core.profile import Profile
from pmgsync.errors import ApplyError, ProtocolError, TransientApplyError
from pmgsync.postgres.apply.bulk import BulkExecutor
from pmgsync.postgres.apply.chain_session import ChainSession
from pmgsync.postgres.apply.failures import is_drift, one_line
from pmgsync.postgres.apply.plan import ApplyStats, Item, NoteItem, PlannedTransaction, SchemaItem, one_by_one
from pmgsync.postgres.apply.planner import Planner
from pmgsync.postgres.apply.rows import RowExecutor
from pmgsync.postgres.apply.stale import StaleTable, StaleTables

log = logging.getLogger(__name__)


class _DriftError(Exception):
    """A row does not fit its table here because the table is another than on the origin."""

    def __init__(self, relation: Relation, reason: str) -> None:
        super().__init__(reason)
        self.relation = relation
        self.reason = reason


class Execution:
    """Executes plans on a session, with what is known and prepared there. One session, one execution.

    Attributes:
        planner: what is known of the tables.
    """

    def __init__(self, session: ChainSession, profile: Profile, stats: ApplyStats, stale: StaleTables) -> None:
        self.planner = Planner(profile, stats, stale)
        self.stats = stats
        self.stale = stale
        self._session = session
        self._rows = RowExecutor(session.origin, stats, stale)
        self._bulk = BulkExecutor(self._rows)

    def begin(self, cursor: Cursor) -> None:
        """Begin a transaction."""
        cursor.execute(b"BEGIN")
        self._rows.begin()
        self._session.notices.clear()

    def finish(
        self, cursor: Cursor, reached: Position, commit_time: int | None, *, transactions: int, changes: int
    ) -> None:
        """Move the position, commit, and count what the transaction was.

        Raises:
            ApplyError: when the server refuses it.
        """
        try:
            self._rows.send(cursor, self._session.commit_at(reached, commit_time))
        except psycopg2.Error as error:
            raise self._session.failed(error, "", reached.lsn) from error
        self._committed(reached, transactions, changes)

    def _committed(self, reached: Position, transactions: int, changes: int) -> None:
        self._session.position = reached
        notices = self._session.notices
        self.stats.missing += notices.missing
        self._rows.count_lost(notices.lost)
        notices.clear()
        self.stats.transactions += transactions
        self.stats.rows += changes

    def recover(self) -> None:
        """Roll back whatever is open and drop what was known of tables. A session that does not answer is closed."""
        self.planner.forget()
        if not self._session.is_open:
            self._session.close()
            return
        try:
            self.rollback()
            with self._session.cursor() as cursor:
                self._rows.prepared.forget(cursor)
        except psycopg2.Error:
            self._session.close()

    def rollback(self) -> None:
        """Roll back whatever is open; what is known of stale tables is as it is committed."""
        with self._session.cursor() as cursor:
            cursor.execute(b"ROLLBACK")
            self.stale.load(cursor)

    # -- groups of small transactions

    def commit_group(self, group: list[PlannedTransaction], reached: Position) -> None:
        """Commit whole transactions, and the position that is reached with them.

        Raises:
            TransientApplyError: when repeating may help.
            ApplyError: when one cannot be applied; those before it are committed.
        """
        if reached == self._session.position:
            return
        if not self._committed_at_once(group, reached):
            for planned in group:
                self._commit_one(planned)
            if reached > self._session.position:
                self.commit_group([], reached)
            return
        self._committed(
            reached, sum([planned.count for planned in group]), sum([planned.changes for planned in group])
        )  # fmt: skip

    def _committed_at_once(self, group: list[PlannedTransaction], reached: Position) -> bool:
        """Commit a group in one local transaction; False when that did not go as planned, and nothing is done: then
        each of its transactions is by itself."""
        when = group[-1].commit_time if group else None
        for executor in (self._bulk, self._rows):
            script = [b"BEGIN"]
            try:
                with self._session.cursor() as cursor:
                    self._rows.begin()
                    self._session.notices.clear()
                    executor.batch(cursor, [item for planned in group for item in planned.items], script)
                    script += self._session.commit_at(reached, when)
                    self._rows.send(cursor, script)
            except (psycopg2.Error, ApplyError, ProtocolError) as error:
                self._raise_transient(error, reached.lsn)
                if not group:
                    raise
                self.recover()
                log.info(
                    "action=repeat origin=%d position=%s reason=%s",
                    self._session.origin,
                    self._session.position,
                    one_line(error),
                )
                self.stats.repeats += 1
                self._bulk.failed()
                with self._session.cursor() as cursor:
                    group[:] = [one for some in group for one in (some.apart(cursor) if some.apart else [some])]
                    for planned in group:
                        self.planner.renew(cursor, planned.items, planned.lsn)
            else:
                return True
        return False

    def _commit_one(self, planned: PlannedTransaction) -> None:
        """Apply one transaction, row by row: exactly what the origin did, or the real error."""
        with self._session.cursor() as cursor:
            while True:
                self.begin(cursor)
                self.planner.renew(cursor, planned.items, planned.lsn)
                try:
                    self._one_by_one(cursor, planned)
                except _DriftError as drift:
                    self.recover()
                    self._leave_out(planned, drift)
                else:
                    break
            reached = Position(planned.lsn, LAST)
            self.finish(cursor, reached, planned.commit_time, transactions=1, changes=planned.changes)

    def _one_by_one(self, cursor: Cursor, planned: PlannedTransaction) -> None:
        for item in one_by_one(planned.items):
            try:
                self._rows.one(cursor, item, planned.lsn)
            except psycopg2.Error as error:
                target = getattr(item, "target", None) or next(iter(getattr(item, "targets", ())), None)
                if isinstance(item, Item) and is_drift(error, differs=item.target.differs):
                    raise _DriftError(item.target.relation, one_line(error)) from error
                name = target.relation.qualified if target is not None else ""
                raise self._session.failed(error, name, planned.lsn) from error

    def _leave_out(self, planned: PlannedTransaction, drift: _DriftError) -> None:
        relation = drift.relation
        reason = f"its rows do not fit the table here ({drift.reason})"
        table = StaleTable(relation.namespace, relation.name, "table", reason, lsn=planned.lsn)
        planned.items.insert(0, NoteItem(stale=self.stale.note(table)))

    # -- in steps: large transactions, and such that change the schema

    def commit_steps(self, planned: PlannedTransaction, rest: Sequence[Change | Unread]) -> None:
        """Apply a transaction of which not everything can be planned at once."""
        with self._session.cursor() as cursor:
            self.begin(cursor)
            changes = self.execute_steps(cursor, planned, rest)
            self.finish(cursor, Position(planned.lsn, LAST), planned.commit_time, transactions=1, changes=changes)

    def execute_steps(self, cursor: Cursor, planned: PlannedTransaction, rest: Sequence[Change | Unread]) -> int:
        """Execute what is planned in the open transaction, then the rest; returns how many changes it were."""
        changes = 0
        while True:
            self._execute_part(cursor, planned)
            changes += planned.changes
            if planned.items and type(planned.items[-1]) is SchemaItem:
                self.planner.forget()
            if not rest:
                return changes
            items, rest = self.planner.plan(cursor, rest, planned.lsn)
            planned = PlannedTransaction(planned.lsn, planned.commit_time, items)

    def _execute_part(self, cursor: Cursor, planned: PlannedTransaction) -> None:
        """Execute a part in the open transaction; under a savepoint, for earlier parts are not at hand any more."""
        missing, lost = self._session.notices.missing, len(self._session.notices.lost)
        script: list[bytes] = []
        cursor.execute(b"SAVEPOINT part")
        try:
            self._bulk.batch(cursor, planned.items, script)
            script.append(b"RELEASE SAVEPOINT part")
            self._rows.send(cursor, script)
        except (psycopg2.Error, ApplyError, ProtocolError) as error:
            self._raise_transient(error, planned.lsn)
            self.stats.repeats += 1
            self._bulk.failed()
            while True:
                cursor.execute(b"ROLLBACK TO SAVEPOINT part")
                self._session.notices.missing = missing
                del self._session.notices.lost[lost:]
                # Locks taken since the savepoint are gone.
                self._rows.begin()
                self.planner.forget()
                self._rows.prepared.forget(cursor)
                self.planner.renew(cursor, planned.items, planned.lsn)
                try:
                    self._one_by_one(cursor, planned)
                except _DriftError as drift:
                    # What the earlier parts did to the table goes when it is fetched anew.
                    self._leave_out(planned, drift)
                else:
                    break
            cursor.execute(b"RELEASE SAVEPOINT part")

    def _raise_transient(self, error: Exception, lsn: int) -> None:
        """Raise when the error is one that row by row would meet again, or that says nothing of the rows."""
        if isinstance(error, psycopg2.Error):
            failed = self._session.failed(error, "", lsn)
            if isinstance(failed, TransientApplyError):
                raise failed from error
        if isinstance(error, TransientApplyError | ProtocolError):
            raise error
