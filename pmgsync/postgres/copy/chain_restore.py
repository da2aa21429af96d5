"""Restoring what one origin answers for: its rows are replaced, or merged in, in one transaction with its position."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions

from pmgsync.core.merging import groups
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import Column, Relation
from pmgsync.core.positions import parse_lsn
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.errors import ApplyError, ConfigError, PmgsyncError, ProtocolError, UnreachableError
from pmgsync.postgres.apply.failures import is_drift, one_line
from pmgsync.postgres.apply.merge_sql import delete_others, merge_from
from pmgsync.postgres.apply.rows import MERGE_LOCK
from pmgsync.postgres.apply.stale import StaleTable, TableName, forget, record
from pmgsync.postgres.apply.target import Target, load_target
from pmgsync.postgres.catalog import Table, as_bytes, as_text, list_tables
from pmgsync.postgres.copy.copy_stream import CopyIn
from pmgsync.postgres.copy.pieces import checked_vector, copy_from, set_position, table_label, table_piece
from pmgsync.postgres.copy.take import chain_condition
from pmgsync.postgres.replication_origin import take_origin
from pmgsync.postgres.session import connect, quote_ident

log = logging.getLogger(__name__)

ORIGIN_PATIENCE_S = 20.0
STAGING = b"pg_temp.pmgsync_staging"

Connection = psycopg2.extensions.connection


# Over 250 lines: one transaction from the first piece to the position, and each step needs its session and its order.
class ChainRestore:
    """Takes the pieces of a chain snapshot into the database that is there.

    `feed` each piece, `finish`; `close` in any case. Nothing is visible before `finish`, without it nothing happened.
    Readers are not kept waiting: rows are deleted, not truncated.

    A table that does not fit here is left out and noted as stale; the others are not held up by it.

    Attributes:
        rows, bytes: how much has been fed.
        stale: the tables of which something was left out.
    """

    def __init__(
        self,
        dsn: str,
        profile: Profile,
        *,
        origin: int,
        own_cid: int,
        master: int,
        members: Collection[int],
        tables: Collection[TableName] | None = None,
    ) -> None:
        """Begin the transaction, with the origin's name on it, so that capture does not send it on.

        Args:
            tables: those that are fetched while the chain goes on; None: all, and the chain begins anew.

        Raises:
            UnreachableError: when the server does not let it in, or another session applies this origin's chain.
        """
        self.rows = self.bytes = 0
        self._profile = profile
        self._origin = origin
        self._writers = Writers.at(origin, master, {*members, own_cid})
        self._wanted = None if tables is None else frozenset(tables)
        self.stale: dict[TableName, StaleTable] = {}
        self._skipping = False
        self._staged = False
        self._copy: CopyIn | None = None
        self._table: Table | None = None
        self._rule: TableRule | None = None
        self._target: Target | None = None
        self._columns: list[bytes] = []
        self._condition = b""
        self._seen: set[int] = set()
        self._connection = connect(dsn, application_name=f"pmgsync resync {origin}", replica=True)
        try:
            self._connection.autocommit = True
            self._take_origin()
            self._execute(b"BEGIN")
            self._tables = {(table.schema, table.name): table for table in list_tables(self._connection)}
        except psycopg2.Error as error:
            self.close()
            raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
        except BaseException:
            self.close()
            raise

    def feed(self, piece: Mapping[str, Any], attachment: bytes | None) -> None:
        """Take the next piece.

        Raises:
            ProtocolError: when it cannot stand here, or speaks of what the origin does not answer for.
            PmgsyncError: when the server refuses it.
        """
        data = attachment or b""
        with self._errors():
            match piece.get("kind"):
                case "wait" | "plan":
                    pass
                case "table" if self._copy is None and not self._skipping:
                    self._begin_table(piece)
                case "rows" if self._copy is not None or self._skipping:
                    self.bytes += len(data)
                    self.rows += data.count(b"\n")
                    with self._fitting():
                        if self._copy is not None:
                            self._copy.feed(data)
                case "table-end" if self._copy is not None or self._skipping:
                    with self._fitting():
                        if self._copy is not None:
                            copy, self._copy = self._copy, None
                            copy.finish()
                            self._end_table()
                    self._skipping, self._table, self._rule = False, None, None
                case kind:
                    raise ProtocolError(f"the snapshot has a piece {kind!r:.40} where none can stand")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Set the position and commit: from now on everything is visible, and durable.

        Raises:
            ProtocolError: when something is missing.
        """
        vector = checked_vector(result)
        with self._errors():
            if self._copy is not None or result.get("rows") != self.rows or self._origin not in vector:
                raise ProtocolError(f"the snapshot ended after {self.rows} of {result.get('rows')} rows")
            self._conclude(vector[self._origin])
            self._execute(b"COMMIT")
        for table in self.stale.values():
            log.warning("action=stale origin=%d table=%s reason=%s", self._origin, table.label, table.reason)
        log.info("action=chain-restored origin=%d rows=%d bytes=%d", self._origin, self.rows, self.bytes)

    def close(self) -> None:
        """End the session; without `finish` everything is rolled back."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def _conclude(self, place: tuple[int, int, int]) -> None:
        """Write down where this leaves chain and tables."""
        incarnation, lsn, _ = place
        for statement in forget(self._origin, self._wanted):
            self._execute(statement)
        if self._wanted is None:
            self._execute(set_position(self._origin, *place))
        else:
            with self._connection.cursor() as cursor:
                cursor.execute("SELECT incarnation, lsn::text FROM pmgsync.position WHERE origin = %s", (self._origin,))
                row = cursor.fetchone()
            # The copy must not be older than what is here, and of the same chain.
            if row is None or row[0] != incarnation or parse_lsn(as_text(row[1])) > lsn:
                raise UnreachableError(f"the tables were copied at another place of the chain of node {self._origin}")
        # What was fetched is whole, and the changes that brought it there are still to come.
        whole = [StaleTable(*key, "none", "") for key in (self._wanted or frozenset()) - self.stale.keys()]
        for table in (*self.stale.values(), *whole):
            self._execute(record(self._origin, replace(table, lsn=lsn, until=lsn)))

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """Leave a table out, and only it, when its rows do not fit."""
        try:
            yield
        except psycopg2.Error as error:
            if self._table is None or not is_drift(error, differs=True):
                raise
            if self._copy is not None:
                self._copy.close()
                self._copy = None
            self._execute(b"ROLLBACK TO SAVEPOINT pmgsync_table")
            reason = f"its rows do not fit the table here ({one_line(error)})"
            self._leave_out(self._table.schema, self._table.name, reason)

    def _leave_out(self, schema: bytes, name: bytes, reason: str) -> None:
        self.stale[schema, name] = StaleTable(schema, name, "table", reason)
        self._skipping = True

    # -- tables --------------------------------------------------------------------------------------------------------

    def _begin_table(self, piece: Mapping[str, Any]) -> None:
        schema, name, columns = table_piece(piece)
        label = table_label(schema, name)
        rule = self._profile.rule_for(as_text(schema), as_text(name))
        condition = None if rule is None else chain_condition(rule, self._writers)
        if rule is None or condition is None:
            raise ProtocolError(f"node {self._origin} sent rows of {label}, which it does not answer for")
        if self._wanted is not None and (schema, name) not in self._wanted:
            raise ProtocolError(f"node {self._origin} sent rows of {label}, which was not asked for")
        table = self._tables.get((schema, name))
        if table is None:
            self._leave_out(schema, name, f"table {label} does not exist here")
            return
        if table.oid in self._seen:
            raise ProtocolError(f"the snapshot has the table {label} twice")
        here = set(table.copied(rule.local_columns))
        self._seen.add(table.oid)
        lacking = [column for column in columns if column not in here]
        shown = ", ".join(sorted(as_text(column).encode("utf-8", "replace").decode() for column in lacking))
        present = [column for column in columns if column in here]
        reason = _unfit(table, rule, present)
        if reason is None and rule.policy is Policy.MERGE:
            reason = self._find_target(schema, name, rule, present)
        if reason is not None:
            self._leave_out(schema, name, reason)
            return
        if lacking:
            self.stale[schema, name] = StaleTable(
                schema, name, "columns", f"it lacks columns here: {shown}", tuple(lacking)
            )
        self._execute(b"SAVEPOINT pmgsync_table")
        self._table, self._rule, self._columns, self._condition = table, rule, present, condition
        self._staged = bool(lacking) or rule.policy is Policy.MERGE
        if rule.policy is not Policy.MERGE:
            self._execute(b"DELETE FROM ONLY %s%s" % (table.quoted, b" WHERE " + condition if condition else b""))
        if self._staged:
            listed = b", ".join(map(quote_ident, present))
            self._execute(b"DROP TABLE IF EXISTS %s" % STAGING)
            self._execute(
                b"CREATE TEMPORARY TABLE pmgsync_staging ON COMMIT DROP AS SELECT %s FROM %s WITH NO DATA"
                % (listed, table.quoted)
            )
            for column in lacking:
                self._execute(b"ALTER TABLE %s ADD COLUMN %s text" % (STAGING, quote_ident(column)))
            self._copy = CopyIn(self._connection, copy_from(STAGING, columns))
            return
        # The condition again: this origin may not bring rows of other owners.
        self._copy = CopyIn(self._connection, copy_from(table.quoted, columns, condition))

    def _find_target(self, schema: bytes, name: bytes, rule: TableRule, columns: Collection[bytes]) -> str | None:
        """Look up what rows of these columns are merged into; return why they cannot be, None when they can."""
        described = tuple(Column(column, False, 0, -1) for column in columns)
        try:
            with self._connection.cursor() as cursor:
                self._target = load_target(cursor, Relation(0, schema, name, "d", described, b""), rule, 0)
        except ApplyError as error:
            return error.message
        return None

    def _end_table(self) -> None:
        table, rule = self._table, self._rule
        assert table is not None
        assert rule is not None
        if rule.policy is Policy.MERGE:
            self._execute(b"SELECT pg_catalog.pg_advisory_xact_lock(%d, %d)" % (MERGE_LOCK, table.oid & 0x7FFF_FFFF))
            self._execute(b"ANALYZE %s" % STAGING)
            self._merge(rule)
        elif self._staged:
            listed = b", ".join(map(quote_ident, self._columns))
            where = b" WHERE " + self._condition if self._condition else b""
            self._execute(
                b"INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM %s%s"
                % (table.quoted, listed, listed, STAGING, where)
            )

    def _merge(self, rule: TableRule) -> None:
        """Merge the staged rows: known rows by the rules, missing ones as they are.

        Of a table whose rows only their owner inserts, missing rows of other owners are left to those owners' chains,
        and rows of this origin that it has no more are deleted if deletes travel.
        """
        target = self._target
        assert target is not None
        if not target.key:
            name = target.relation.qualified
            raise PmgsyncError(f"rows of {name} cannot be merged, it has no primary key, the profile names none")
        owned = b"true"
        if rule.inserts_by_owner is not None:
            owned = self._writers.condition(quote_ident(as_bytes(rule.inserts_by_owner)))
            if rule.deletes:
                self._execute(delete_others(target, STAGING, owned))
        for statement in merge_from(target, STAGING, list(target.columns), insertable=owned):
            self._execute(statement)

    # -- the session ---------------------------------------------------------------------------------------------------

    def _take_origin(self) -> None:
        try:
            with self._connection.cursor() as cursor:
                take_origin(cursor, self._origin, patience_s=ORIGIN_PATIENCE_S)
        except psycopg2.errors.ObjectInUse as error:
            raise UnreachableError(f"the chain of node {self._origin} is being applied by another session") from error

    def _execute(self, sql: bytes) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(sql)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg2.Error as error:
            where = f" at the table {self._table.label}" if self._table is not None else ""
            text = f"the rows of node {self._origin} cannot be restored{where} ({str(error).strip()})"
            if isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError):
                raise UnreachableError(text) from error
            raise PmgsyncError(text) from error


def _unfit(table: Table, rule: TableRule, columns: Collection[bytes]) -> str | None:
    """Return why rows of these columns cannot be taken by the table's rule, None when they can."""
    needed = {as_bytes(name) for name in (*rule.key, rule.owner, rule.inserts_by_owner) if name is not None}
    if rule.policy is Policy.MERGE:
        needed |= set() if rule.key else set(table.primary_key)
        try:
            groups(rule.rules, [as_text(column) for column in columns])
        except ConfigError as error:
            return error.message
    missing = sorted(as_text(name).encode("utf-8", "replace").decode() for name in needed - set(columns))
    return f"not both nodes have the columns {', '.join(missing)} of it" if missing else None
