"""The row executor: one statement a row change, in order, many to a round trip; runs of inserts by COPY.

In a batch every statement sees to it by itself that it hits exactly one row, and anything unexpected fails the batch.
Then the same plan is executed one by one, which is exact and says which row of which table it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.pgoutput import UNCHANGED, Row, Value
from pmgsync.core.positions import format_lsn
from pmgsync.core.profile import Policy
from pmgsync.errors import ApplyError, ProtocolError
from pmgsync.postgres.apply import statements
from pmgsync.postgres.apply.chain_session import PREPARE_MOVE
from pmgsync.postgres.apply.merge_sql import merge_row
from pmgsync.postgres.apply.plan import (
    ApplyStats,
    Item,
    NoteItem,
    PlanItem,
    SchemaItem,
    SequenceItem,
    SingleItem,
    TruncateItem,
    one_by_one,
)
from pmgsync.postgres.apply.prepared import PreparedStatements
from pmgsync.postgres.apply.schema import repeat
from pmgsync.postgres.apply.stale import StaleTables
from pmgsync.postgres.apply.statements import OLD, Statement
from pmgsync.postgres.apply.target import Target
from pmgsync.postgres.apply.truncate import truncate
from pmgsync.postgres.apply.values import CopySource
from pmgsync.postgres.session import quote_literal
from pmgsync.postgres.setup.sequence_values import follow

SCRIPT_BYTES = 256 << 10
"""A script is sent when it is this long."""
COPY_ROWS = 8
"""A run of inserts into one table is copied from this length on."""
MERGE_LOCK = 0x706D_6773
"""First key of the advisory locks under which rows without a unique key are merged; the second is the table's OID."""


class _Prepared(NamedTuple):
    head: bytes
    arguments: Callable[[Row], Any]
    """Picks the parameters from the old row, if there is one, followed by the new one, if there is one."""
    one: bool
    none: bool


class RowExecutor:
    """Executes plans on a session. One session, one executor: it knows what is prepared there.

    Attributes:
        origin: CID of the node whose changes they are.
        prepared: the session's prepared statements.
    """

    def __init__(self, origin: int, stats: ApplyStats, stale: StaleTables) -> None:
        self.origin = origin
        self._stale = stale
        self._stats = stats
        self.prepared = PreparedStatements(PREPARE_MOVE)
        self._locked: set[int] = set()

    def count_lost(self, noticed: Iterable[str]) -> None:
        """Count the conflicts that pmgsync.merged has told of: a target's number and the columns that lost."""
        for told in noticed:
            number, _, columns = told.strip().partition(" ")
            for column in columns.split(","):
                rule = f"{self.prepared.tables.get(int(number), '')}.{column}"
                self._stats.conflicts += 1
                self._stats.lost[rule] = self._stats.lost.get(rule, 0) + 1

    def begin(self) -> None:
        """A local transaction begins: no lock is held."""
        self._locked.clear()

    # -- batches

    def batch(self, cursor: Cursor, plan: Sequence[PlanItem], script: list[bytes]) -> None:
        """Execute a plan. What is left over when it ends is in the script, to be sent with what follows.

        Args:
            script: statements to be sent first; left with those not sent yet.

        Raises:
            psycopg2.Error: when anything did not go as planned.
            ProtocolError: when a row has values that no row has.
        """
        size = 0
        items = list(one_by_one(plan))
        at, end = 0, len(items)
        while at < end:
            item = items[at]
            at += 1
            if isinstance(item, NoteItem):
                script += self._noted(item)
                continue
            if not isinstance(item, Item):
                self.send(cursor, script)
                self.prepared.trim(cursor)
                self._other(cursor, item)
                size = 0
                continue
            target = item.target
            if item.kind == "I" and target.columns and target.rule.policy is not Policy.MERGE:
                until = at
                while until < end and (other := items[until])[0] is target and other[1] == "I":
                    until += 1
                if until - at + 1 >= COPY_ROWS:
                    self.send(cursor, script)
                    copy_rows(cursor, target, [other[3] for other in items[at - 1 : until]])  # type: ignore[misc]
                    at, size = until, 0
                    continue
            self.lock(target, script)
            statement = self._call(cursor, item, exact=False)
            script.append(statement)
            size += len(statement)
            if size > SCRIPT_BYTES:
                self.send(cursor, script)
                self.prepared.trim(cursor)
                size = 0

    def send(self, cursor: Cursor, script: list[bytes]) -> None:
        """Execute the script's statements and empty it.

        Raises:
            ProtocolError: when a statement has a byte 0, at which libpq would end it.
        """
        if script:
            text = b";".join(script)
            script.clear()
            if b"\0" in text:
                raise ProtocolError("a row has a value with a byte 0, which PostgreSQL never writes")
            cursor.execute(text)

    def lock(self, target: Target, script: list[bytes]) -> None:
        """Have the lock taken under which rows are merged without a unique key: two appliers must not both find that
        a row is not here. One lock a table, for locks are a bounded resource of the server's."""
        if target.rule.policy is Policy.MERGE and not target.arbiter and target.oid not in self._locked:
            # Half of the OIDs are negative to a function that takes an integer.
            script.append(b"SELECT pg_catalog.pg_advisory_xact_lock(%d, %d)" % (MERGE_LOCK, target.oid & 0x7FFF_FFFF))
            self._locked.add(target.oid)

    # -- one by one

    def one(self, cursor: Cursor, item: SingleItem, lsn: int) -> None:
        """Execute one item and see what it did.

        Raises:
            psycopg2.Error: when the server refuses it.
            ApplyError: when the row to change is not here, on a table that must be an exact copy.
        """
        if not isinstance(item, Item):
            self._other(cursor, item)
            return
        target = item.target
        owned_insert = item.kind == "I" and target.rule.policy is Policy.OWNED and target.arbiter
        self.prepared.trim(cursor)
        lock: list[bytes] = []
        self.lock(target, lock)
        self.send(cursor, lock)
        self.send(cursor, [self._call(cursor, item, exact=True, variant="nothing" if owned_insert else "")])
        hits = cursor.rowcount
        if hits == 1 or (target.rule.policy is Policy.MERGE and item.kind != "D"):
            return
        name = target.relation.qualified
        if owned_insert:
            self._stats.conflicts += 1
            self.send(cursor, [self._call(cursor, item, exact=True, variant="upsert")])
            self._stats.lost[f"{name}.*"] = self._stats.lost.get(f"{name}.*", 0) + 1
            assert item.new is not None
            values = [item.new[place] for place in target.arbiter]
            key = b", ".join(quote_literal(value) for value in values if isinstance(value, bytes))
            cursor.execute(
                b"INSERT INTO pmgsync.conflict (origin, schema, name, row_key, column_name, rule) "
                b"VALUES (%d, %s, %s, ARRAY[%s]::text[], '*', 'owned: the row that was here')"
                % (self.origin, quote_literal(target.relation.namespace), quote_literal(target.relation.name), key)
            )
        elif hits < 1 and not target.strict:
            self._stats.missing += 1
        elif target.rule.policy is not Policy.MERGE:
            verb = "update" if item.kind == "U" else "delete" if item.kind == "D" else "insert"
            raise ApplyError(
                f"the row to {verb} in {name} is here {max(hits, 0)} times: this copy is not what the origin has",
                table=name,
                lsn=format_lsn(lsn),
                hint=f"something wrote to {name} on this node: put the row back as the origin had it",
            )

    def _other(self, cursor: Cursor, item: TruncateItem | SequenceItem | NoteItem | SchemaItem) -> None:
        if isinstance(item, TruncateItem):
            truncate(cursor, item)
            return
        if isinstance(item, NoteItem):
            self.send(cursor, self._noted(item))
            return
        if isinstance(item, SchemaItem):
            self.prepared.forget(cursor)
            notes = repeat(cursor, item, self._stale)
            self.send(cursor, [statement for note in notes for statement in self._noted(note)])
            return
        for name in follow(cursor, item.values):
            self._stats.warn(f"the sequence {name} of the master is not here")

    def _noted(self, item: NoteItem) -> list[bytes]:
        stale = self._stale
        if item.stale is not None:
            # Again, for a rollback may have taken it back since it was planned.
            stale.tables[item.stale.key] = item.stale
            return [stale.record(item.stale)]
        assert item.relation is not None
        stale.relations[item.relation[:2]] = item.relation[2]
        return [stale.record_relation(item.relation)]

    # -- statements

    def _call(self, cursor: Cursor, item: Item, *, exact: bool, variant: str = "") -> bytes:
        """Return the EXECUTE of an item's statement, prepared now if it was not."""
        target, kind, old, new = item
        nulls: frozenset[int] = frozenset()
        written: tuple[int, ...] | None = None
        if target.full and old is not None:
            nulls = frozenset(place for place in target.indexed if old[place] is None)
        if kind == "U":
            assert new is not None
            written = self._written(target, old, new)
        shape = (exact, variant, kind, old is None, nulls, written)
        prepared = target.prepared.get(shape)
        if prepared is None:
            prepared = self._prepare(cursor, target, shape)
        row = (new or ()) if old is None else old if new is None else old + new
        assert isinstance(prepared, _Prepared)
        try:
            if prepared.one:
                values: Sequence[Value] = (prepared.arguments(row),)
            elif prepared.none:
                return prepared.head
            else:
                values = prepared.arguments(row)
            return (
                prepared.head
                + b"("
                + b",".join(
                    [
                        b"NULL" if value is None else b"'" + value.replace(b"'", b"''") + b"'"  # type: ignore[union-attr]
                        for value in values
                    ]
                )
                + b")"
            )
        except AttributeError as error:
            raise ProtocolError(f"a row of {target.relation.qualified} lacks a value that identifies it") from error

    @staticmethod
    def _written(target: Target, old: Row | None, new: Row) -> tuple[int, ...] | None:
        """Return the places that an update sets, None for the usual ones: all but the key that did not change."""
        if UNCHANGED not in new and not target.always:
            return None
        return tuple(
            place
            for place, column in target.columns.items()
            if new[place] is not UNCHANGED
            and not (old is None and place in target.key)
            and not (
                column.identity == "a" and old is not None and (target.full or place in target.key)
                and old[place] == new[place]
            )
        )  # fmt: skip

    def _prepare(self, cursor: Cursor, target: Target, shape: tuple[Any, ...]) -> _Prepared:
        exact, variant, kind, same_key, nulls, written = shape
        name = target.relation.qualified
        try:
            statement = _statement(target, self.origin, variant, kind, same_key, nulls, written)
        except ValueError as error:
            raise ApplyError(
                f"{name} has nothing that a row could be found by", table=name,
                hint="give the table a primary key, or name a key in the profile",
            ) from error  # fmt: skip
        merged = target.rule.policy is Policy.MERGE
        if not exact and kind != "I" and not (merged and kind == "U"):
            otherwise = b"pmgsync.diverged()" if target.strict else b"pmgsync.missing(%d)" % target.number
            statement = statements.checked(statement, otherwise)
        prepared_name = self.prepared.prepare(cursor, target, statement.sql, statement.types)
        width = len(target.relation.columns)
        # An update that kept its key has no old row, a delete no new one.
        shift = 0 if same_key or kind == "I" else width
        places = [place if row == OLD else place + shift for row, place in statement.sources]
        prepared = _Prepared(
            b"EXECUTE " + prepared_name, itemgetter(*places) if places else tuple, len(places) == 1, not places
        )
        target.prepared[shape] = prepared
        return prepared


def copy_rows(cursor: Cursor, target: Target, new: Sequence[Row], messages: Sequence[bytes] = ()) -> None:
    """Insert rows by COPY, text format: rows that were read, or as messages.

    Raises:
        psycopg2.Error: when the server refuses one.
        ProtocolError: when a row is malformed.
    """
    names = b", ".join(column.name for column in target.columns.values())
    source = CopySource(target, new, messages)
    try:
        cursor.copy_expert(  # of a file it needs `read` only
            b"COPY %s (%s) FROM STDIN" % (target.name, names), source, CopySource.SIZE,  # type: ignore[arg-type]
        )  # fmt: skip
    except psycopg2.Error as error:
        # psycopg2 ends the COPY by an error of its own when the source fails.
        raise source.failed or error from error


def _statement(
    target: Target, origin: int, variant: str, kind: str, same_key: bool, nulls: frozenset[int],
    written: tuple[int, ...] | None,
) -> Statement:  # fmt: skip
    if target.rule.policy is Policy.MERGE and kind != "D":
        complete = kind == "I" or written is None or set(target.columns) <= {*target.key, *written}
        given = list(target.columns) if complete else sorted({*target.key, *(written or ())})
        # Where deletes do not travel, what is gone was purged here, and comes back on purpose.
        returns = kind == "U" and target.rule.deletes
        return merge_row(target, given, may_insert=complete, origin=origin, returns=returns)
    if kind == "I":
        plain = statements.insert(target)
        if variant == "nothing":
            return plain._replace(body=plain.body + b" ON CONFLICT DO NOTHING")
        return statements.upsert(target) if variant == "upsert" else plain
    if kind == "D":
        return statements.delete(target, nulls)
    if written is None:
        written = tuple(place for place in target.columns if not (same_key and place in target.key))
    return statements.update(target, written, nulls)
