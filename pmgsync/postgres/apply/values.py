"""Values of many rows as text that PostgreSQL reads: lines of COPY, and array literals. Pure.

Separators are written as a byte 0 and a letter first, so that whole runs of values can be escaped at once: no value of
PostgreSQL has a byte 0, and counting proves that none came in.
"""

from __future__ import annotations

from collections.abc import Sequence

from pmgsync.core.pgoutput import Row, Value
from pmgsync.errors import ProtocolError
from pmgsync.postgres.apply.target import Target


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
                row = [b"\0N" if value is None else value for value in row]  # noqa: PLW2901
            lines.append(b"\0t".join(row))  # type: ignore[arg-type]
    except TypeError as error:
        raise ProtocolError(f"an inserted row of {target.relation.qualified} lacks a value") from error
    data = b"\0n".join(lines)
    _check(data, {b"t": len(lines) * (len(places) - 1), b"n": len(lines) - 1, b"N": nulls})
    for plain, escaped in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        if plain in data:
            data = data.replace(plain, escaped)
    return data.replace(b"\0t", b"\t").replace(b"\0n", b"\n").replace(b"\0N", b"\\N") + b"\n"


def array_literal(target: Target, values: Sequence[Value]) -> bytes:
    """Return an SQL literal of an array with these values, each in the text that its type's input function takes.

    Raises:
        ProtocolError: when a value is unchanged or has a byte 0.
    """
    nulls = 0
    if None in values:
        nulls = values.count(None)
        values = [b"\0N" if value is None else value for value in values]
    try:
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


def _check(data: bytes, marks: dict[bytes, int]) -> None:
    if data.count(b"\0") != sum(marks.values()) or any(data.count(b"\0" + m) != n for m, n in marks.items()):
        raise ProtocolError("a row has a value with a byte 0, which PostgreSQL never writes")
