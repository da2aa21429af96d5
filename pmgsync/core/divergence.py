"""Divergence files: changes to master-owned tables that do not count, kept as JSON lines that people and programs read.

Pure; reading and writing the file is the caller's. One line a change, in commit order, between a first line that says
what the file is and a last one that says how many there are; a file without it is unfinished and is made anew. Bytes
that are not UTF-8 (an SQL_ASCII database has them) survive as lone surrogates, `\\udc80` to `\\udcff`.

Invariant: what is read from the lines of a transaction is what was written, value for value and byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pmgsync.core.changes import Change, Truncated
from pmgsync.core.forks import Divergence
from pmgsync.core.pgoutput import Delete, Emitted, Insert, Relation, Row, Unchanged, Update
from pmgsync.core.positions import format_lsn, parse_lsn
from pmgsync.errors import ProtocolError

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
        kind: `insert`, `update`, `delete` or `truncate`.
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


def diverged_changes(
    changes: Iterable[Change], lsn: int, time: int, counts: Callable[[bytes, bytes], bool]
) -> Iterator[Diverged]:
    """Return what a transaction did to master-owned tables.

    Args:
        counts: says of a schema and a name whether the table is the master's.
    """
    for change in changes:
        match change:
            case Emitted():
                continue
            case Truncated(relations=relations):
                for one in relations:
                    if counts(one.namespace, one.name):
                        yield Diverged(lsn, time, "truncate", one.namespace, one.name, {})
            case (Relation() as relation, row):
                if counts(relation.namespace, relation.name):
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


def first_line(what: Divergence, *, cluster: bytes, node: int, epoch: int) -> str:
    """Return the line that a file begins with.

    Args:
        node: CID of the member that had the changes; epoch: the one that they do not count in.
    """
    return _dump(
        {
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
    return _dump(
        {
            "lsn": format_lsn(change.lsn),
            "time": (_1970 + timedelta(microseconds=change.time)).isoformat(timespec="microseconds"),
            "table": [_text(change.schema), _text(change.table)],
            "kind": change.kind,
            "key": _texts(change.key),
            "old": None if change.old is None else _texts(change.old),
            "new": None if change.new is None else _texts(change.new),
        }
    )


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
        return DivergenceFile(what, bytes.fromhex(head["cluster"]), head["node"], head["epoch"], tuple(changes))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"line 1 of the divergence file cannot be read ({type(error).__name__})") from error


def _read_change(data: dict[str, Any]) -> Diverged:
    if data["kind"] not in {"insert", "update", "delete", "truncate"}:
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
