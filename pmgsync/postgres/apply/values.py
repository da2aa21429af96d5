"""Values of many rows as text that PostgreSQL reads: lines of COPY, and array literals. Pure.

Separators are written as a byte 0 and a letter first, so that whole runs of values can be escaped at once: no value of
PostgreSQL has a byte 0, and counting proves that none came in.
"""

from __future__ import annotations

from collections.abc import Sequence

from pmgsync.core.changes import flat_values, read_row
from pmgsync.core.pgoutput import Row, Value
from pmgsync.errors import ProtocolError
from pmgsync.postgres.apply.target import Target

_NULL = b"\0N"
_SPECIAL = (b"\0", b"\\", b"'")


class CopySource:
    """A file that COPY reads: the lines of some rows are made while the server takes in those before.

    Attributes:
        failed: what was wrong with a row; reading has ended then.
    """

    SIZE = 1 << 20
    """Bytes that COPY may ask for at once."""
    ROWS = 2_000
    """Rows whose lines are made at once."""

    def __init__(self, target: Target, rows: Sequence[Row], messages: Sequence[bytes]) -> None:
        self.failed: ProtocolError | None = None
        self._target = target
        self._left: Sequence[Row] | Sequence[bytes] = rows or messages
        self._make = copy_text if rows else copy_messages
        assert not (rows and messages)
        self._at = 0
        self._lines = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return the next lines, at most so many bytes; nothing at the end.

        Raises:
            ProtocolError: when a row is malformed.
        """
        if not self._lines and self._at < len(self._left):
            some = self._left[self._at : self._at + self.ROWS]
            self._at += len(some)
            try:
                self._lines = memoryview(self._make(self._target, some))  # type: ignore[arg-type]
            except ProtocolError as error:
                self.failed = error
                raise
        given, self._lines = self._lines[:size], self._lines[size:]
        return bytes(given)


def copy_text(target: Target, new: Sequence[Row]) -> bytes:
    """Return rows as lines of COPY text format.

    Raises:
        ProtocolError: when a value is unchanged or has a byte 0.
    """
    places = list(target.columns)
    rows: Sequence[Sequence[Value]] = new
    if places != list(range(len(target.relation.columns))):
        rows = [[row[place] for place in places] for row in new]
    nulls = 0
    lines: list[bytes] = []
    try:
        for row in rows:
            if None in row:
                nulls += row.count(None)
                row = _marked(row)  # noqa: PLW2901
            lines.append(b"\0t".join(row))  # type: ignore[arg-type]
    except TypeError as error:
        raise ProtocolError(f"an inserted row of {target.relation.qualified} lacks a value") from error
    data = b"\0n".join(lines)
    _check(data, {b"t": len(lines) * (len(places) - 1), b"n": len(lines) - 1, b"N": nulls})
    for plain, escaped in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        if plain in data:
            data = data.replace(plain, escaped)
    return data.replace(b"\0t", b"\t").replace(b"\0n", b"\n").replace(b"\0N", b"\\N") + b"\n"


def copy_messages(target: Target, messages: Sequence[bytes]) -> bytes:
    """Return inserted rows as lines of COPY text format, the values straight from the messages where that is possible.

    Raises:
        ProtocolError: when a row is malformed, or a value is unchanged or has a byte 0.
    """
    width = len(target.relation.columns)
    if len(target.columns) == width:
        values: Sequence[Value] | None = flat_values(messages, width)
        if values is not None:
            nulls = values.count(None)
            if nulls:
                values = _marked(values)
            lines = b"\n".join(map(b"\t".join, zip(*[iter(values)] * width, strict=True))) + b"\n"
            if (
                lines.count(b"\t") == len(messages) * (width - 1) and lines.count(b"\n") == len(messages)
                and b"\\" not in lines and b"\r" not in lines and lines.count(b"\0") == nulls == lines.count(_NULL)
            ):  # fmt: skip
                return lines.replace(_NULL, b"\\N") if nulls else lines
    return copy_text(target, list(map(read_row, messages)))


def array_literal(target: Target, values: Sequence[Value]) -> bytes:
    """Return an SQL literal of an array with these values, each in the text that its type's input function takes.

    Raises:
        ProtocolError: when a value is unchanged or has a byte 0.
    """
    nulls = values.count(None)
    if nulls:
        values = _marked(values)
    try:
        plainly = b'","'.join(values)  # type: ignore[arg-type]
        if not nulls and plainly.count(b'"') == 2 * len(values) - 2 and not any(map(plainly.__contains__, _SPECIAL)):
            return b"'{\"%s\"}'" % plainly
        data = b"\0t".join(values)  # type: ignore[arg-type]
    except TypeError as error:
        raise ProtocolError(f"a row of {target.relation.qualified} lacks a value that identifies it") from error
    _check(data, {b"t": max(0, len(values) - 1), b"N": nulls})
    # Escaped for the array first, then for the literal around it.
    for plain, escaped in ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"'", b"''")):
        if plain in data:
            data = data.replace(plain, escaped)
    data = data.replace(b"\0t", b'","')
    return b"'{%s}'" % (b'"%s"' % data).replace(b'"\0N"', b"NULL") if values else b"'{}'"


def _marked(values: Sequence[Value]) -> list[Value]:
    return [_NULL if value is None else value for value in values]


def _check(data: bytes, marks: dict[bytes, int]) -> None:
    if data.count(b"\0") != sum(marks.values()) or any(data.count(b"\0" + m) != n for m, n in marks.items()):
        raise ProtocolError("a row has a value with a byte 0, which PostgreSQL never writes")
