"""Messages of PostgreSQL's `pgoutput` plugin, protocol version 1, text format: bytes to values. Pure, no I/O.

Source: PostgreSQL documentation, "Logical Replication Message Formats". Every change of every row passes through here,
twice a node, so the tuple reader is one loop without a call of our own per column.
"""

from __future__ import annotations

import functools
import struct
from enum import Enum
from typing import Final, NamedTuple

from pmgsync.errors import ProtocolError

_POSTGRES_EPOCH_US = 946_684_800_000_000
"""Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL's timestamps begin."""


class Unchanged(Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
"""Stands for an out-of-line value that an UPDATE did not touch. It is not NULL: writing NULL instead destroys data."""

Value = bytes | None | Unchanged
Row = tuple[Value, ...]


class Column(NamedTuple):
    """A column as the origin describes it; `key` is true when it belongs to the replica identity."""

    name: bytes
    key: bool
    type_oid: int
    typmod: int


class Relation(NamedTuple):
    """A table as the origin describes it.

    Attributes:
        identity: the replica identity: d default, n nothing, f full, i index.
        raw: the message itself; equal descriptions of one table have equal bytes.
    """

    id: int
    namespace: bytes
    name: bytes
    identity: str
    columns: tuple[Column, ...]
    raw: bytes

    @property
    def qualified(self) -> str:
        """Schema and name for people; bytes that are not UTF-8 are shown escaped."""
        return f"{self.namespace.decode(errors='backslashreplace')}.{self.name.decode(errors='backslashreplace')}"


class Insert(NamedTuple):
    """A row that came to be."""

    relation_id: int
    new: Row


class Update(NamedTuple):
    """A row that changed.

    Attributes:
        old: None when the replica identity did not change; otherwise its old values (`old_is_key`, every other column
            is None there and says nothing), or under REPLICA IDENTITY FULL the whole old row.
    """

    relation_id: int
    old: Row | None
    old_is_key: bool
    new: Row


class Delete(NamedTuple):
    """A row that is gone; `old` as in `Update`."""

    relation_id: int
    old: Row
    old_is_key: bool


class Truncate(NamedTuple):
    """Tables that were emptied by one statement."""

    relation_ids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class Begin(NamedTuple):
    """A transaction's start; the LSN is that of its commit record, the time µs since 1970."""

    final_lsn: int
    commit_time_us: int
    xid: int


class Commit(NamedTuple):
    """A transaction's end; the time in µs since 1970."""

    commit_lsn: int
    end_lsn: int
    commit_time_us: int


class Emitted(NamedTuple):
    """A logical decoding message, written by pg_logical_emit_message."""

    prefix: bytes
    content: bytes


class Ignored(NamedTuple):
    """An Origin or Type message: well known, and of no use to a receiver."""

    kind: bytes


RowChange = Insert | Update | Delete
Message = Insert | Update | Delete | Truncate | Begin | Commit | Relation | Emitted | Ignored

_INSERT, _UPDATE, _DELETE = ord("I"), ord("U"), ord("D")
_BEGIN, _COMMIT, _RELATION, _TRUNCATE = ord("B"), ord("C"), ord("R"), ord("T")
_EMITTED = ord("M")
_OLD, _KEY, _NEW = ord("O"), ord("K"), ord("N")
_TEXT, _NULL, _TOAST = ord("t"), ord("n"), ord("u")

_u16 = struct.Struct(">H").unpack_from
_u32 = struct.Struct(">I").unpack_from
_begin = struct.Struct(">xQqI")
_commit = struct.Struct(">xBQQq")
_truncate = struct.Struct(">xIB")
_emitted = struct.Struct(">xBQ")
_column = struct.Struct(">Ii")
BEGIN_BYTES, COMMIT_BYTES = _begin.size, _commit.size


def _tuple(data: bytes, at: int, most: int = 0xFFFF) -> tuple[Row, int]:
    """Return the row that begins at a place, or its first values, and where these end."""
    (count,) = _u16(data, at)
    count = min(count, most)
    at += 2
    values: list[Value] = []
    append, u32 = values.append, _u32
    for _ in range(count):
        kind = data[at]
        if kind == _TEXT:
            start = at + 5
            at = start + u32(data, at + 1)[0]
            append(data[start:at])
        elif kind == _NULL:
            append(None)
            at += 1
        elif kind == _TOAST:
            append(UNCHANGED)
            at += 1
        else:
            raise ProtocolError(f"a row holds a value of the unknown kind {kind}")
    # A slice ends silently where its bytes end: one comparison here instead of one for each column.
    if at > len(data):
        raise ProtocolError("a row ends before its values do")
    return tuple(values), at


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.index(0, at)
    return data[at:end], end + 1


@functools.lru_cache(maxsize=4096)
def _decode_relation(data: bytes) -> Relation:
    (relation_id,) = _u32(data, 1)
    namespace, at = _text(data, 5)
    name, at = _text(data, at)
    identity = chr(data[at])
    if identity not in "dnfi":
        raise ProtocolError(f"a relation has the unknown replica identity {identity!r}")
    (count,) = _u16(data, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        flags = data[at]
        column, at = _text(data, at + 1)
        type_oid, typmod = _column.unpack_from(data, at)
        at += 8
        columns.append(Column(column, bool(flags & 1), type_oid, typmod))
    if at != len(data):
        raise ProtocolError("a relation message has bytes after its end")
    # An empty namespace means pg_catalog.
    return Relation(relation_id, namespace or b"pg_catalog", name, identity, tuple(columns), data)


def _decode(data: bytes) -> Message:
    kind = data[0]
    if kind == _INSERT:
        if data[5] != _NEW:
            raise ProtocolError("an insert has no new row")
        new, at = _tuple(data, 6)
        message: Message = Insert(_u32(data, 1)[0], new)
    elif kind == _UPDATE:
        mark = data[5]
        old, at = None, 5
        if mark in (_OLD, _KEY):
            old, at = _tuple(data, 6)
        if data[at] != _NEW:
            raise ProtocolError("an update has no new row")
        new, at = _tuple(data, at + 1)
        message = Update(_u32(data, 1)[0], old, mark == _KEY, new)
    elif kind == _DELETE:
        mark = data[5]
        if mark not in (_OLD, _KEY):
            raise ProtocolError("a delete has no old row")
        old, at = _tuple(data, 6)
        message = Delete(_u32(data, 1)[0], old, mark == _KEY)
    elif kind == _BEGIN:
        lsn, time, xid = _begin.unpack_from(data)
        message, at = Begin(lsn, time + _POSTGRES_EPOCH_US, xid), _begin.size
    elif kind == _COMMIT:
        _, lsn, end, time = _commit.unpack_from(data)
        message, at = Commit(lsn, end, time + _POSTGRES_EPOCH_US), _commit.size
    elif kind == _RELATION:
        return _decode_relation(data)
    elif kind == _TRUNCATE:
        count, options = _truncate.unpack_from(data)
        at = _truncate.size + 4 * count
        if at != len(data):  # before 4 GiB are asked for
            raise ProtocolError("a truncate has another length than its tables need")
        ids = struct.unpack_from(f">{count}I", data, _truncate.size)
        message = Truncate(ids, bool(options & 1), bool(options & 2))
    elif kind == _EMITTED:
        prefix, start = _text(data, _emitted.size)
        (length,) = _u32(data, start)
        content, at = data[start + 4 : start + 4 + length], start + 4 + length
        message = Emitted(prefix, content)
    elif data[:1] in b"OY":
        return Ignored(data[:1])
    else:
        raise ProtocolError(f"a message has the unknown kind {data[:1]!r}")
    if at != len(data):
        raise ProtocolError(f"a message of kind {data[:1]!r} has bytes after its end")
    return message


def decode(data: bytes) -> Message:
    """Return what a message says.

    Raises:
        ProtocolError: when it is not exactly one message of pgoutput version 1 in text format.
    """
    try:
        return _decode(data)
    except (IndexError, ValueError, struct.error) as error:
        raise _cut_off(data) from error


def first_values(data: bytes, most: int) -> Row:
    """Return the first values of the new row of an update that kept its key.

    Raises:
        ProtocolError: when they are malformed; what follows them is not looked at.
    """
    try:
        return _tuple(data, 6, most)[0]
    except (IndexError, struct.error) as error:
        raise _cut_off(data) from error


def _cut_off(data: bytes) -> ProtocolError:
    return ProtocolError(f"a message of kind {data[:1]!r} is cut off after {len(data)} bytes")
