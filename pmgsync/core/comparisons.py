"""Comparing what several nodes hold: which rows and files differ, on which node, and who has them right. Pure.

Each node is read at a moment of its own: one exact position on all of them would need a pause of every chain. So what
differs is looked at again after everybody has applied what had been committed anywhere, and `lasting` keeps what is
the same in both looks. What was only on its way is right by then, or is another value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pmgsync.core.manifests import Entry
from pmgsync.core.profile import Policy, TableRule

Kind = Literal["differs", "missing", "extra"]
Row = tuple[bytes, bytes]
"""A digest of the row's values, and the text of its owner column, b"" where there is none."""
Sum = tuple[int, int]
"""How many rows, and the sum of their digests."""


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """One row or file that a node does not have as it should.

    Attributes:
        cid: the node that has it wrong.
        source: CID of the node that has it right.
        key: of the row as text, or the file's name.
        kind: `missing` there, `extra` there, or another content.
        evidence: what both hold, as digests: the same difference found twice has the same.
    """

    cid: int
    source: int
    key: bytes
    kind: Kind
    evidence: tuple[bytes, bytes]


def differing_chunks(answers: Mapping[int, Mapping[int, Sum]]) -> list[int]:
    """Return the chunks of a table that are not the same on all nodes, from each node's sums by chunk."""
    numbers = {number for sums in answers.values() for number in sums}
    return sorted(number for number in numbers if len({sums.get(number) for sums in answers.values()}) > 1)


def in_groups(chunks: Iterable[int], answers: Mapping[int, Mapping[int, Sum]], most: int) -> list[list[int]]:
    """Return chunks in groups that have at most so many rows on any node, or one chunk."""
    groups: list[list[int]] = []
    size = most
    for chunk in chunks:
        rows = max(sums.get(chunk, (0, 0))[0] for sums in answers.values())
        size += rows
        if not groups or size > most:
            groups.append([])
            size = rows
        groups[-1].append(chunk)
    return groups


def compare_rows(
    rule: TableRule, answers: Mapping[int, Mapping[bytes, Row]], *, master: int, members: Collection[int]
) -> list[Difference]:
    """Return the rows that differ, from each node's rows by key.

    Mirrored rows are right on the master, owned ones on their owner, or on the master when that is gone. Of merged
    rows nobody's is right: each node is told to take the other's in. A merged row that is missing somewhere counts
    only where deletes travel.
    """
    found = []
    for key in sorted({key for rows in answers.values() for key in rows}):
        held = {cid: rows.get(key) for cid, rows in answers.items()}
        if len(set(held.values())) == 1:
            continue
        if rule.policy is Policy.MERGE:
            found += _merged(rule, key, held)
            continue
        source = master if rule.policy is Policy.MIRROR else _owner(held.values(), master, members)
        if source not in held:
            continue
        right = held[source]
        found += [_difference(cid, source, key, row, right) for cid, row in held.items() if row != right]
    return found


def _owner(rows: Iterable[Row | None], master: int, members: Collection[int]) -> int:
    text = next(row[1] for row in rows if row is not None).strip()
    cid = int(text) if text.isdigit() and len(text) < 10 else master
    return cid if cid in members else master


def _merged(rule: TableRule, key: bytes, held: Mapping[int, Row | None]) -> list[Difference]:
    there = {cid: row for cid, row in held.items() if row is not None}
    pairs = [(cid, source) for cid in held for source in there if held[cid] != held[source]]
    if not rule.deletes:
        pairs = [(cid, source) for cid, source in pairs if cid in there]
    return [_difference(cid, source, key, held[cid], held[source]) for cid, source in pairs]


def _difference(cid: int, source: int, key: bytes, row: Row | None, right: Row | None) -> Difference:
    kind: Kind = "missing" if row is None else "extra" if right is None else "differs"
    return Difference(cid, source, key, kind, (row[0] if row else b"", right[0] if right else b""))


def compare_trees(
    owner: int,
    right: Mapping[bytes, Entry],
    answers: Mapping[int, Mapping[bytes, Entry | None]],
    *,
    config: bool,
    gone: bool = False,
) -> list[Difference]:
    """Return the files that differ from their owner's.

    Args:
        right: what the owner has.
        answers: what the others have, by CID; None for a name that was put in place there and is gone: it was purged,
            which is no difference in a spool.
        config: modes count too; in a spool they are the receiver's.
        gone: the spool is of a node that is no member any more: what others have beyond the owner is no difference.
    """
    found = []
    for cid, entries in answers.items():
        for name in sorted({*right, *entries}):
            here, there = entries.get(name), right.get(name)
            if (not config and here is None and name in entries) or (gone and there is None):
                continue
            if _same(here, there, config=config):
                continue
            kind: Kind = "missing" if here is None else "extra" if there is None else "differs"
            evidence = (here.digest if here else b"", there.digest if there else b"")
            found.append(Difference(cid, owner, name, kind, evidence))
    return found


def _same(here: Entry | None, there: Entry | None, *, config: bool) -> bool:
    if here is None or there is None:
        return here is there
    return here.same_content(there) and (not config or here.mode == there.mode)


def lasting(before: Iterable[Difference], after: Iterable[Difference]) -> list[Difference]:
    """Return the differences that were there twice, with the same evidence.

    Between the two looks everything that had been committed was applied everywhere. What is only on its way is right
    by then, or is another content.
    """
    return sorted(set(before) & set(after))
