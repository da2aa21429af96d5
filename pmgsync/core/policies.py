"""Which of an origin's changes count on this node, by the policy of their table. Pure, no I/O.

A mirrored table has one writer, the master of the time; a row of an owned table has one, the node that answers for it
(see `owners`); any node may write to a merged table.
"""

from __future__ import annotations

from pmgsync.core.changes import Deleted, Inserted, Unread, Updated, key_reader
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import UNCHANGED, Delete, Insert, Relation, Row, RowChange, Update
from pmgsync.core.profile import Policy, TableRule
from pmgsync.errors import ApplyError


def counts_wholly(rule: TableRule, writers: Writers) -> bool | None:
    """Return whether all (True) or none (False) of the origin's changes to a table count; None: row by row."""
    match rule.policy:
        case Policy.MIRROR:
            return writers.leads
        case Policy.OWNED:
            return None
        case Policy.MERGE:
            return None if rule.inserts_by_owner or not rule.deletes else True
    return False


def owner_index(rule: TableRule, relation: Relation) -> int | None:
    """Return the place of the owner column among the origin's columns, None when the rule names none.

    Raises:
        ApplyError: when the table has none there.
    """
    name = rule.inserts_by_owner if rule.policy is Policy.MERGE else rule.owner
    if name is None:
        return None
    for index, column in enumerate(relation.columns):
        if column.name == name.encode():
            return index
    raise ApplyError(
        f"table {relation.qualified} has no column {name!r}, which the profile names as its owner",
        table=relation.qualified,
        hint="bring the table and the profile into agreement",
    )


def select(
    rule: TableRule, relation: Relation, change: RowChange, writers: Writers, owner: int | None
) -> RowChange | None:
    """Return the change to make on this node: the same, one of another kind, or None when it does not count.

    Args:
        owner: the place of the owner column, as `owner_index` says.

    Raises:
        ApplyError: when the change does not say whose row it is.
    """
    wholly = counts_wholly(rule, writers)
    if wholly is not None:
        return change if wholly else None
    if rule.policy is Policy.MERGE:
        if isinstance(change, Delete):
            if not rule.deletes or owner is None:
                return change if rule.deletes else None
            _require_owner(relation, owner, change.old_is_key)
            return change if writers.answers_for(change.old[owner]) else None
        if isinstance(change, Insert) and owner is not None:
            return change if writers.answers_for(change.new[owner]) else None
        return change
    assert owner is not None
    match change:
        case Insert():
            return change if writers.answers_for(change.new[owner]) else None
        case Delete():
            _require_owner(relation, owner, change.old_is_key)
            return change if writers.answers_for(change.old[owner]) else None
        case Update():
            return _select_update(relation, change, owner, writers)


def select_unread(rule: TableRule, relation: Relation, change: Unread, writers: Writers, owner: int | None) -> Unread:
    """Return those of changes that stay messages that count on this node, where that depends on their rows. Each is
    made here as `select` says: a row that kept its key, or is named by it, kept its owner.

    Raises:
        ApplyError: when the changes do not say whose rows they are.
        ProtocolError: when one is malformed, as far as it is read.
    """
    assert counts_wholly(rule, writers) is None
    if rule.policy is Policy.MERGE:
        if isinstance(change, Updated) or (isinstance(change, Inserted) and owner is None):
            return change
        if isinstance(change, Deleted) and (not rule.deletes or owner is None):
            return change if rule.deletes else change._replace(messages=[])
    assert owner is not None
    if isinstance(change, Deleted):
        _require_owner(relation, owner, old_is_key=True)
    owner_of, counts = key_reader((owner,)), writers.answers_for
    return change._replace(messages=[message for message in change.messages if counts(owner_of(message))])


def _select_update(relation: Relation, change: Update, owner: int, writers: Writers) -> RowChange | None:
    whose = change.new[owner]
    before = whose
    if change.old is not None:
        _require_owner(relation, owner, change.old_is_key)
        before = change.old[owner]
        if whose is UNCHANGED:
            whose = before
    was, is_now = writers.answers_for(before), writers.answers_for(whose)
    if was and not is_now:
        # The row goes to another owner, who writes it from now on. Its old form must not stay here.
        assert change.old is not None
        return Delete(change.relation_id, change.old, change.old_is_key)
    if is_now and not was:
        assert change.old is not None
        new = filled(change.new, None if change.old_is_key else change.old)
        return change if UNCHANGED in new else Insert(change.relation_id, new)
    return change if is_now else None


def _require_owner(relation: Relation, owner: int, old_is_key: bool) -> None:
    if old_is_key and not relation.columns[owner].key:
        raise ApplyError(
            f"a change of {relation.qualified} does not say whose row it was",
            table=relation.qualified,
            hint=f"set REPLICA IDENTITY FULL on {relation.qualified} on every node",
        )


def filled(new: Row, old: Row | None) -> Row:
    """Return a new row with its unchanged values taken from the whole old row, as far as that is known."""
    if old is None or UNCHANGED not in new:
        return new
    return tuple(before if value is UNCHANGED else value for value, before in zip(new, old, strict=True))
