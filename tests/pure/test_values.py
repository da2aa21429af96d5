"""Values as PostgreSQL reads them: fast ways give what the thorough ones give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.pgoutput import UNCHANGED, Insert, Row
from pmgsync.errors import ProtocolError
from pmgsync.postgres.apply.values import array_literal, copy_messages, copy_text
from tests.pure.test_pgoutput import encode

values = st.sampled_from(
    [None, None, b"", b"a", b"t", b"n", b"N", b"u", b"\\", b"\\N", b'"', b'","', b"'", b"\t", b"\n", b"\r", b"x" * 300]
) | st.binary(max_size=4)
tables = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[values] * width), min_size=1, max_size=5))


def target(width: int) -> Any:
    relation = SimpleNamespace(columns=(None,) * width, qualified="public.t")
    return SimpleNamespace(relation=relation, columns=dict.fromkeys(range(width)))


def has_zero(rows: list[Row]) -> bool:
    return any(isinstance(value, bytes) and b"\0" in value for row in rows for value in row)


@given(tables)
def test_lines_are_the_same_from_messages_and_from_rows(rows: list[Row]) -> None:
    messages = [encode(Insert(7, row)) for row in rows]
    if has_zero(rows):
        with pytest.raises(ProtocolError):
            copy_messages(target(len(rows[0])), messages)
        return
    escaped = {b"\\": b"\\\\", b"\t": b"\\t", b"\n": b"\\n", b"\r": b"\\r"}

    def text(value: Any) -> bytes:
        return b"\\N" if value is None else b"".join(escaped.get(bytes([char]), bytes([char])) for char in value)

    expected = b"".join(b"\t".join(map(text, row)) + b"\n" for row in rows)
    assert copy_messages(target(len(rows[0])), messages) == copy_text(target(len(rows[0])), rows) == expected


@given(st.lists(values, max_size=6))
def test_an_array_has_the_values(row: list[Any]) -> None:
    if has_zero([tuple(row)]):
        with pytest.raises(ProtocolError):
            array_literal(target(1), row)
        return

    def text(value: Any) -> bytes:
        if value is None:
            return b"NULL"
        return b'"%s"' % value.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"'", b"''")

    assert array_literal(target(1), row) == b"'{%s}'" % b",".join(map(text, row))


@given(st.lists(values | st.just(UNCHANGED), max_size=6).filter(lambda row: UNCHANGED in row))
def test_an_array_lacks_no_value(row: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        array_literal(target(1), row)
