"""Merging: how the values of two rows of one key become one. Pure: a model in Python, and the same as SQL expressions.

Invariant: on rows, `merge_rows` is commutative, associative and idempotent, so every node that has met the same set of
rows, in any order and with any repetition, has the same row. It holds because each group of columns that move together
has a total order that does not depend on the node, and the merge takes the greater one. NULL is below every value.
Values that the order itself leaves equal are ordered by their text, compared as bytes. Two writes of one second are
simultaneous for a rule that compares seconds. A column without a rule keeps the value that it was inserted with.

Repairs. Nobody sends a node its own change back. So a node that writes against a rule (an older `mtime`, N after D),
or purges a row and makes it again, would keep what it alone believes. Therefore whoever merges a row into something
else than what came owes a repair: it publishes the row as it is now, as an update of its own. When no repair is owed
and all is applied, all nodes that have the row are equal. For the content of a node's row is either what it last wrote
itself, or equals what last came, or was repaired; so it is in some chain, every other node's row is at least that, and
the order is antisymmetric. It comes to rest because each further repair needs a value higher up. Repairs wait a second
and are collected by key: a row that several nodes write at once costs one update per node and two seconds, not one
update per change. The application's own transaction is never changed: a trigger that merged on write would answer with
another row than the application wrote. The application sees the cluster's value some seconds later, just as if another
node had written it.

What that needs: no node purges a row while a write or a repair of it is still on its way to anybody. A node that has
purged takes a lesser row that arrives later, and keeps it until the row's next change; whoever has both keeps the
better one, and owes nothing, since it has merged into just what came. Purging is by age, so this takes a node that was
cut off for as long as rows are kept.

Deletes that travel. An update wins over a delete of the same row that it did not know of: whoever deleted the row gets
it back with the update and repairs it everywhere, in whatever order the others hear of the two. INSERT … ON CONFLICT DO
UPDATE of a row that is there is an update. Two deletes are one. A delete after an update that it knew of deletes. There
are no tombstones and no clocks in this, so one case stays open: one node deletes a row while another node deletes it
too and inserts it again. The other loses its new row to the delete, the first has it, and a third has it or not by the
order in which it hears of the two. They differ until somebody updates the row where it is.

`tests/pure/test_convergence_model.py` is the model of all this and has the open cases too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pmgsync.core.profile import MergeRule
from pmgsync.errors import ConfigError


class Sides(NamedTuple):
    """A column of two rows that are merged, as SQL expressions.

    Attributes:
        mine, theirs: the local value, the incoming one.
        mine_text, theirs_text: their texts: two values with the same text are the same. NULL for NULL.
        collatable: a collation decides the order of the values.
    """

    mine: bytes
    theirs: bytes
    mine_text: bytes
    theirs_text: bytes
    collatable: bool


Columns = Mapping[str, Sides]


def _literal(value: bytes) -> bytes:
    return b"'" + value.replace(b"'", b"''") + b"'"


def groups(rules: Mapping[str, MergeRule], columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns that move together under `latest`, sorted, by the column that is compared.

    Raises:
        ConfigError: when the table lacks a column that is compared.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(columns):
        rule = rules.get(name)
        if rule is None or rule.kind != "latest":
            continue
        by = rule.by or name
        if by not in columns:
            raise ConfigError(f"column {name!r} is merged by {by!r}, which the row does not have")
        found.setdefault(by, []).append(name)
    for by, members in found.items():
        if by not in members:
            members.append(by)
            members.sort()
    return found


def merge_rows(
    rules: Mapping[str, MergeRule], mine: Mapping[str, Any], theirs: Mapping[str, Any], text: Callable[[Any], bytes]
) -> dict[str, Any]:
    """Return the merge of two rows of the same columns: the model that the SQL expressions follow.

    Args:
        text: the bytes of a value that is not None; two values with the same bytes are the same.
    """
    merged = dict(mine)
    for by, members in groups(rules, list(mine)).items():
        rank_mine, rank_theirs = (_rank_latest(rules, row, by, members, text) for row in (mine, theirs))
        if rank_theirs > rank_mine:
            merged.update({name: theirs[name] for name in members})
    for name, rule in rules.items():
        if name in mine and rule.kind != "latest":
            merged[name] = _merge_value(rule, mine[name], theirs[name], text)
    return merged


def _rank_latest(
    rules: Mapping[str, MergeRule],
    row: Mapping[str, Any],
    by: str,
    members: Sequence[str],
    text: Callable[[Any], bytes],
) -> tuple[Any, ...]:
    ranks: list[Any] = [(False,) if row[by] is None else (True, row[by])]
    for name in members:
        value = row[name]
        written = b"" if value is None else text(value)
        tie = rules[name].tie if name in rules else None
        ranks += [0 if value is None else 2 if tie is not None and written == tie.encode() else 1, written]
    return tuple(ranks)


def _merge_value(rule: MergeRule, mine: Any, theirs: Any, text: Callable[[Any], bytes]) -> Any:
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    match rule.kind:
        case "advance":
            order = [value.encode() for value in rule.order]
            ranks = [order.index(text(value)) + 1 if text(value) in order else 0 for value in (mine, theirs)]
            return theirs if (ranks[1], text(theirs)) > (ranks[0], text(mine)) else mine
        case "greatest":
            return theirs if (theirs, text(theirs)) > (mine, text(mine)) else mine
        case _:
            return theirs if (theirs, text(theirs)) < (mine, text(mine)) else mine


def merge_expressions(rules: Mapping[str, MergeRule], columns: Columns) -> dict[str, bytes]:
    """Return the expression of each merged column's new value; columns without a rule are left out.

    Raises:
        ConfigError: when the table lacks a column that is compared.
    """

    found: dict[str, bytes] = {}
    for by, members in groups(rules, list(columns)).items():
        wins = _latest_wins(rules, columns, by, members)
        for name in members:
            found[name] = b"CASE WHEN %s THEN %s ELSE %s END" % (wins, columns[name].theirs, columns[name].mine)
    for name, rule in rules.items():
        if name not in columns or rule.kind == "latest":
            continue
        mine, theirs, mine_text, theirs_text, collatable = columns[name]
        texts = (_bytewise(theirs_text), _bytewise(mine_text))
        if rule.kind == "advance":
            order = b"ARRAY[%s]::text[]" % b", ".join(_literal(value.encode()) for value in rule.order)
            ranks = [b"coalesce(pg_catalog.array_position(%s, %s), 0)" % (order, text) for text in texts]
            better = b"ROW(%s, %s) > ROW(%s, %s)" % (ranks[0], texts[0], ranks[1], texts[1])
        else:
            sign = b">" if rule.kind == "greatest" else b"<"
            left, right = _sortable(theirs, collatable), _sortable(mine, collatable)
            better = b"%s %s %s OR (%s = %s AND %s %s %s)" % (
                *(left, sign, right),
                *(left, right, texts[0], sign, texts[1]),
            )
        found[name] = (
            b"CASE WHEN %s IS NOT DISTINCT FROM NULL THEN %s WHEN %s IS NOT DISTINCT FROM NULL THEN %s "
            b"WHEN %s THEN %s ELSE %s END" % (mine, theirs, theirs, mine, better, theirs, mine)
        )
    return found


def _bytewise(text: bytes) -> bytes:
    return b'(%s) COLLATE pg_catalog."C"' % text


def _sortable(expression: bytes, collatable: bool) -> bytes:
    # The database's collation may sort differently on another node.
    return b'%s COLLATE pg_catalog."C"' % expression if collatable else expression


def _latest_wins(rules: Mapping[str, MergeRule], columns: Columns, by: str, members: Sequence[str]) -> bytes:
    """Return the condition that the incoming group is the greater one."""
    ranks: list[list[bytes]] = [[], []]
    for name in members:
        tie = rules[name].tie if name in rules else None
        given = columns[name]
        for side, (expression, text) in enumerate(((given.mine, given.mine_text), (given.theirs, given.theirs_text))):
            rank = b"CASE WHEN %s IS NOT DISTINCT FROM NULL THEN 0" % expression
            if tie is not None:
                rank += b" WHEN %s = %s THEN 2" % (_bytewise(text), _literal(tie.encode()))
            ranks[side] += [rank + b" ELSE 1 END", b"coalesce(%s, '')" % _bytewise(text)]
    mine, theirs, _, _, collatable = columns[by]
    left, right = _sortable(theirs, collatable), _sortable(mine, collatable)
    later = b"ROW(%s) > ROW(%s)" % (b", ".join(ranks[1]), b", ".join(ranks[0]))
    return (
        b"CASE WHEN %s IS NOT DISTINCT FROM NULL THEN %s IS NOT DISTINCT FROM NULL AND %s "
        b"WHEN %s IS NOT DISTINCT FROM NULL THEN true ELSE %s > %s OR (%s = %s AND %s) END"
        % (theirs, mine, later, mine, left, right, left, right, later)
    )
