"""The plan of a transaction: what is to be done to which target, in order. Every executor takes it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.ceilings import Value
from pmgsync.core.changes import Deleted, Inserted, Unread, Updated, read_delete, read_row, read_update, rows_of
from pmgsync.core.ddl import SchemaChange
from pmgsync.core.pgoutput import Delete, Insert, Relation, Row, RowChange, Update
from pmgsync.core.policies import filled
from pmgsync.postgres.apply.stale import StaleTable
from pmgsync.postgres.apply.target import Target

WARNINGS_KEPT = 1000


class Item(NamedTuple):
    """One row change.

    Attributes:
        kind: insert, update or delete.
        old: what finds the row: its key (every other value is meaningless) or, when the target is `full`, all of it.
            None for an insert, and for an update that did not change the key.
        new: the row's new values; None for a delete.
    """

    target: Target
    kind: Literal["I", "U", "D"]
    old: Row | None
    new: Row | None


class RowsItem(NamedTuple):
    """Rows that came to be, one after the other, in a target that they can be copied to, as messages."""

    target: Target
    messages: list[bytes]


class UpdateItem(NamedTuple):
    """Rows that changed and kept their keys, one after the other, as messages."""

    target: Target
    messages: list[bytes]


class DeleteItem(NamedTuple):
    """Rows that are gone, one after the other, each named by its key, as messages."""

    target: Target
    messages: list[bytes]


class TruncateItem(NamedTuple):
    """Tables emptied by one statement.

    Attributes:
        targets: emptied wholly.
        parts: emptied of the rows for which a condition holds.
    """

    targets: tuple[Target, ...]
    parts: tuple[tuple[Target, bytes], ...]
    restart_identity: bool


class SequenceItem(NamedTuple):
    """Sequences that the master's have come near."""

    values: tuple[Value, ...]


class NoteItem(NamedTuple):
    """What the node notes about a table in the transaction that makes it true.

    Attributes:
        stale: what is left out from now on.
        relation: schema, name and OID of a table of the origin's.
    """

    stale: StaleTable | None = None
    relation: tuple[bytes, bytes, int] | None = None


class SchemaItem(NamedTuple):
    """A change of the schema. It is the last of its plan: what follows is planned when it is done.

    Attributes:
        lsn: of the commit.
    """

    change: SchemaChange
    lsn: int


SingleItem = Item | TruncateItem | SequenceItem | NoteItem | SchemaItem
UnreadItem = RowsItem | UpdateItem | DeleteItem
PlanItem = SingleItem | UnreadItem


OfTable = tuple[Relation, RowChange] | Unread
"""What happened to rows of one table."""


def count_of(change: OfTable) -> int:
    """Return how many changes of rows it is."""
    return len(change.messages) if isinstance(change, Unread) else 1


def each_row(change: OfTable) -> list[RowChange]:
    """Return each row's change by itself.

    Raises:
        ProtocolError: when one is malformed.
    """
    return list(rows_of(change)) if isinstance(change, Unread) else [change[1]]


def plan_wholly(target: Target, change: OfTable, items: list[PlanItem]) -> None:
    """Plan changes that all count."""
    if isinstance(change, Inserted) and target.copies:
        items.append(RowsItem(target, change.messages))
    elif isinstance(change, Updated) and not target.merges:
        items.append(UpdateItem(target, change.messages))
    elif isinstance(change, Deleted) and not target.merges:
        items.append(DeleteItem(target, change.messages))
    else:
        for row in each_row(change):
            plan_row(target, row, items)


def plan_row(target: Target, row: RowChange, items: list[PlanItem]) -> None:
    """Plan a change that counts."""
    if type(row) is Insert:
        items.append(Item(target, "I", None, row[1]))
    elif target.merges:
        _merge(target, row, items)
    elif type(row) is Update:
        items.append(Item(target, "U", row[1], row[3]))
    else:
        items.append(Item(target, "D", row[1], None))


def _merge(target: Target, change: RowChange, items: list[PlanItem]) -> None:
    """A merge is a function of the local row and the new one: what was there before on the origin only tells
    another key, and the values that were not sent."""
    if isinstance(change, Delete):
        items.append(Item(target, "D", change.old, None))
        return
    assert isinstance(change, Update)
    whole = None if change.old_is_key else change.old
    new: Row = filled(change.new, whole)
    old = change.old
    if old is not None and any(old[place] != new[place] for place in target.key) and target.rule.deletes:
        items.append(Item(target, "D", old, None))
    items.append(Item(target, "U", None, new))


def one_by_one(items: Iterable[PlanItem]) -> Iterator[SingleItem]:
    """Yield the items of a plan with one for each row.

    Raises:
        ProtocolError: when a row is malformed.
    """
    for item in items:
        if isinstance(item, RowsItem):
            yield from (Item(item.target, "I", None, read_row(message)) for message in item.messages)
        elif isinstance(item, UpdateItem):
            yield from (Item(item.target, "U", None, read_update(message).new) for message in item.messages)
        elif isinstance(item, DeleteItem):
            yield from (Item(item.target, "D", read_delete(message), None) for message in item.messages)
        else:
            yield item


def changes_in(items: Iterable[PlanItem]) -> int:
    """Return how many changes of the origin a plan holds."""
    return sum([len(i.messages) if isinstance(i, UnreadItem) else type(i) is not NoteItem for i in items])


@dataclass(slots=True)
class PlannedTransaction:
    """A transaction of the origin, or what a part of one holds; or many of them as one, whose items are by table.

    Attributes:
        lsn: of the commit, the last one.
        commit_time: µs since 1970, None when unknown.
        count: how many transactions it is.
        apart: returns them one by one, planned anew; None when it is one.
    """

    lsn: int
    commit_time: int | None
    items: list[PlanItem]
    count: int = 1
    apart: Callable[[Cursor], list[PlannedTransaction]] | None = None

    @property
    def changes(self) -> int:
        """How many changes of the origin it holds."""
        return changes_in(self.items)


@dataclass(slots=True)
class ApplyStats:
    """What an applier has done since it was made.

    Attributes:
        rows: changes that were applied.
        transactions: transactions of the origin that were committed here.
        skipped: changes that do not count on this node by the profile.
        stale: changes that were left out because their table cannot be applied.
        missing: rows to change or delete that were not here, where that is no divergence.
        conflicts: values that lost against others.
        lost: how many, by table and column.
        repeats: batches that were applied again row by row.
        warnings: sentences on tables, each once.
    """

    rows: int = 0
    transactions: int = 0
    skipped: int = 0
    stale: int = 0
    missing: int = 0
    conflicts: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    repeats: int = 0
    warnings: dict[str, None] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Keep a sentence, once; the oldest goes when there are too many."""
        if text not in self.warnings:
            self.warnings[text] = None
            if len(self.warnings) > WARNINGS_KEPT:
                self.warnings.pop(next(iter(self.warnings)))
