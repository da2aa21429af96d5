"""Divergence files: changes to master-owned tables that do not count, kept as JSON lines that people and programs read.

Pure; reading and writing the file is the caller's. One line a change, in commit order, between a first line that says
what the file is and a last one that says how many there are; a file without it is unfinished and is made anew. Bytes
that are not UTF-8 (an SQL_ASCII database has them) survive as lone surrogates, `\\udc80` to `\\udcff`.

Invariant: what is read from the lines of a transaction is what was written, value for value and byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pmgsync.core import ddl
from pmgsync.core.changes import Change, Truncated
from pmgsync.core.forks import Divergence
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import Delete, Emitted, Insert, Relation, Row, RowChange, Unchanged, Update
from pmgsync.core.policies import counts_wholly, owner_index, select
from pmgsync.core.positions import format_lsn, parse_lsn
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.errors import ApplyError, ProtocolError

VERSION = 1
_1970 = datetime(1970, 1, 1, tzinfo=UTC)

Values = Mapping[bytes, bytes | None]
"""Column → value in text form, None for NULL. A column that is missing was not touched, or is not known."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """One change.

    Attributes:
        lsn: of the transaction's commit on the origin.
        time: of the commit, µs since 1970 by the origin's clock.
        kind: `insert`, `update`, `delete` or `truncate`; `schema`: a statement, which stands in `new`.
        key: of the row; empty when the table has none: then `old` is the whole row.
        old: what is known of the row before: its key, or all of it under REPLICA IDENTITY FULL.
        new: the row afterwards, without out-of-line values that were not touched.
    """

    lsn: int
    time: int
    kind: str
    schema: bytes
    table: bytes
    key: Values
    old: Values | None = None
    new: Values | None = None


class MastersRows:
    """Says which changes count only while their origin is master: those of mirrored tables, and of other tables those
    of rows that the master writes in place of nodes that are gone.
    """

    def __init__(self, profile: Profile, origin: int, members: Collection[int]) -> None:
        """Begin.

        Args:
            members: the CIDs of all members.
        """
        self._profile = profile
        self._as_master = Writers.at(origin, origin, members)
        self._as_node = Writers.at(origin, 0, members, leads=False)

    def mirrors(self, relation: Relation) -> bool:
        """Return True when only the master writes a table."""
        rule = self.rule(relation.namespace, relation.name)
        return rule is not None and rule.policy is Policy.MIRROR

    def rule(self, schema: bytes, name: bytes) -> TableRule | None:
        """Return what the profile says of a table."""
        return self._profile.rule_for(*(part.decode(errors="surrogateescape") for part in (schema, name)))

    def has(self, relation: Relation, row: RowChange) -> bool:
        """Return True when a change counts only while its origin is master."""
        rule = self.rule(relation.namespace, relation.name)
        if rule is None or rule.policy is Policy.LOCAL:
            return False
        if rule.policy is Policy.MIRROR:
            return True
        try:
            owner = owner_index(rule, relation) if counts_wholly(rule, self._as_master) is None else None
            kept = [select(rule, relation, row, writers, owner) for writers in (self._as_master, self._as_node)]
        except ApplyError:
            return False  # whose row it is cannot be told: nobody has applied it
        return kept[0] is not None and kept[1] is None


def diverged_changes(changes: Iterable[Change], lsn: int, time: int, rows: MastersRows) -> Iterator[Diverged]:
    """Return what a transaction did that counts only while its origin is master.

    Raises:
        ProtocolError: when a message of pmgsync's own cannot be read.
    """
    for change in changes:
        match change:
            case Emitted(prefix=ddl.PREFIX, content=content):
                done = ddl.unpack_change(content)
                new = {b"statement": done.statement or done.label.encode("utf-8", "replace")}
                for table in done.tables or (None,):
                    place = (table.schema, table.name) if table is not None else (b"", b"")
                    yield Diverged(lsn, time, "schema", *place, {}, None, new)
            case Emitted():
                continue
            case Truncated(relations=relations):
                for one in relations:
                    if rows.mirrors(one):
                        yield Diverged(lsn, time, "truncate", one.namespace, one.name, {})
            case (Relation() as relation, row):
                if rows.has(relation, row):
                    yield _row(relation, row, lsn, time)


def _row(relation: Relation, row: Insert | Update | Delete, lsn: int, time: int) -> Diverged:
    place = relation.namespace, relation.name
    match row:
        case Insert(new=new):
            return Diverged(lsn, time, "insert", *place, _key(relation, new), None, _values(relation, new))
        case Update(old=None, new=new):
            return Diverged(lsn, time, "update", *place, _key(relation, new), None, _values(relation, new))
        case Update(old=old, old_is_key=is_key, new=new):
            assert old is not None
            before = _values(relation, old, key_only=is_key)
            return Diverged(lsn, time, "update", *place, _key(relation, old), before, _values(relation, new))
        case Delete(old=old, old_is_key=is_key):
            before = _values(relation, old, key_only=is_key)
            return Diverged(lsn, time, "delete", *place, _key(relation, old), before, None)


def _key(relation: Relation, row: Row) -> Values:
    # Under REPLICA IDENTITY FULL every column is marked, and none is a key.
    return {} if relation.identity == "f" else _values(relation, row, key_only=True)


def _values(relation: Relation, row: Row, *, key_only: bool = False) -> Values:
    return {
        column.name: value
        for column, value in zip(relation.columns, row, strict=True)
        if not isinstance(value, Unchanged) and (column.key or not key_only)
    }


# -- lines ------------------------------------------------------------------------------------------------------------


def first_line(what: Divergence, *, cluster: bytes, node: int, epoch: int, missing: str = "") -> str:
    """Return the line that a file begins with.

    Args:
        node: CID of the member that had the changes; epoch: the one that they do not count in.
        missing: a sentence on what the file should have and has not, "" when it has everything.
    """
    return _dump(
        ({"missing": missing} if missing else {})
        | {
            "divergence": VERSION,
            "cluster": cluster.hex(),
            "node": node,
            "epoch": epoch,
            "origin": what.origin,
            "incarnation": what.incarnation,
            "after": format_lsn(what.after),
            "upto": format_lsn(what.upto),
        }
    )


def change_line(change: Diverged) -> str:
    """Return the line of a change."""
    return _dump(change_map(change))


def change_map(change: Diverged) -> dict[str, Any]:
    """Return a change as its line has it."""
    return {
        "lsn": format_lsn(change.lsn),
        "time": (_1970 + timedelta(microseconds=change.time)).isoformat(timespec="microseconds"),
        "table": [_text(change.schema), _text(change.table)],
        "kind": change.kind,
        "key": _texts(change.key),
        "old": None if change.old is None else _texts(change.old),
        "new": None if change.new is None else _texts(change.new),
    }


def last_line(count: int) -> str:
    """Return the line that a finished file ends with."""
    return _dump({"changes": count})


@dataclass(frozen=True, slots=True)
class DivergenceFile:
    """What a file holds."""

    what: Divergence
    cluster: bytes
    node: int
    epoch: int
    changes: tuple[Diverged, ...]
    missing: str = ""


def read_lines(lines: Iterable[str]) -> DivergenceFile:
    """Return what a file holds.

    Raises:
        ProtocolError: when it is not a divergence file, damaged, or unfinished; the message names the line.
    """
    head: dict[str, Any] | None = None
    changes: list[Diverged] = []
    count: int | None = None
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            if head is None:
                if data["divergence"] != VERSION:
                    raise ProtocolError(
                        f"the divergence file has version {data['divergence']!r:.20}, this node reads {VERSION}"
                    )
                head = data
            elif count is not None:
                raise ProtocolError(f"line {number} of the divergence file comes after its end")
            elif "changes" in data:
                count = data["changes"]
            else:
                changes.append(_read_change(data))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(
                f"line {number} of the divergence file cannot be read ({type(error).__name__})"
            ) from error
    if head is None or count is None:
        raise ProtocolError(
            "the divergence file is unfinished", hint="it is made anew from the journal when the node runs"
        )
    if count != len(changes):
        raise ProtocolError(f"the divergence file has {len(changes)} changes, its last line says {count!r:.20}")
    try:
        what = Divergence(head["origin"], head["incarnation"], parse_lsn(head["after"]), parse_lsn(head["upto"]))
        missing = str(head.get("missing", ""))
        return DivergenceFile(
            what, bytes.fromhex(head["cluster"]), head["node"], head["epoch"], tuple(changes), missing
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"line 1 of the divergence file cannot be read ({type(error).__name__})") from error


def _read_change(data: dict[str, Any]) -> Diverged:
    if data["kind"] not in {"insert", "update", "delete", "truncate", "schema"}:
        raise ValueError("unknown kind")
    schema, table = data["table"]
    time = (datetime.fromisoformat(data["time"]) - _1970) // timedelta(microseconds=1)
    key, old, new = (None if data[name] is None else _bytes(data[name]) for name in ("key", "old", "new"))
    return Diverged(parse_lsn(data["lsn"]), time, data["kind"], _raw(schema), _raw(table), key or {}, old, new)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _texts(values: Values) -> dict[str, str | None]:
    return {_text(name): None if value is None else _text(value) for name, value in values.items()}


def _bytes(values: Mapping[str, str | None]) -> Values:
    return {_raw(name): None if value is None else _raw(value) for name, value in values.items()}
