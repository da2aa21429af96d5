"""The plan of a transaction: what is to be done to which target, in order. Every executor takes it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pmgsync.core.ceilings import Value
from pmgsync.core.changes import read_row, read_update
from pmgsync.core.ddl import SchemaChange
from pmgsync.core.pgoutput import Row
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
    """A row that changed and kept its key, as the message that says so."""

    target: Target
    message: bytes


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
PlanItem = SingleItem | RowsItem | UpdateItem


def one_by_one(items: Iterable[PlanItem]) -> Iterator[SingleItem]:
    """Yield the items of a plan with one for each row.

    Raises:
        ProtocolError: when a row is malformed.
    """
    for item in items:
        if isinstance(item, RowsItem):
            yield from (Item(item.target, "I", None, read_row(message)) for message in item.messages)
        elif isinstance(item, UpdateItem):
            yield Item(item.target, "U", None, read_update(item.message).new)
        else:
            yield item


def changes_in(items: Iterable[PlanItem]) -> int:
    """Return how many changes of the origin a plan holds."""
    return sum([len(item.messages) if type(item) is RowsItem else type(item) is not NoteItem for item in items])


@dataclass(slots=True)
class PlannedTransaction:
    """A transaction of the origin, or what a part of one holds.

    Attributes:
        lsn: of the commit.
        commit_time: µs since 1970, None when unknown.
    """

    lsn: int
    commit_time: int | None
    items: list[PlanItem]

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
