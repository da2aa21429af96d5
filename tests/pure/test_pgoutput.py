"""The decoder: what was encoded is read again, and anything else is a ProtocolError, never another exception."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.changes import Change, Inserted, Truncated, expanded, flat_values, read_row, transactions
from pmgsync.core.pgoutput import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Emitted,
    Insert,
    Message,
    Relation,
    Row,
    Truncate,
    Update,
    decode,
)
from pmgsync.core.together import together
from pmgsync.errors import ProtocolError

_EPOCH_US = 946_684_800_000_000

names = st.binary(min_size=1, max_size=8).map(lambda name: name.replace(b"\0", b"x"))
ids = st.integers(0, 2**32 - 1)
times = st.integers(-(2**60), 2**60).map(lambda time: time + _EPOCH_US)
lsns = st.integers(0, 2**63 - 1)
values = st.one_of(st.none(), st.just(UNCHANGED), st.binary(max_size=20))
rows = st.lists(values, max_size=6).map(tuple)


def encode_row(row: Row) -> bytes:
    out = [struct.pack(">H", len(row))]
    for value in row:
        if value is None:
            out.append(b"n")
        elif isinstance(value, bytes):
            out.append(b"t" + struct.pack(">I", len(value)) + value)
        else:
            out.append(b"u")
    return b"".join(out)


def encode(message: Message) -> bytes:
    match message:
        case Insert(relation, new):
            return b"I" + struct.pack(">I", relation) + b"N" + encode_row(new)
        case Update(relation, old, old_is_key, new):
            before = b"" if old is None else (b"K" if old_is_key else b"O") + encode_row(old)
            return b"U" + struct.pack(">I", relation) + before + b"N" + encode_row(new)
        case Delete(relation, old, old_is_key):
            return b"D" + struct.pack(">I", relation) + (b"K" if old_is_key else b"O") + encode_row(old)
        case Truncate(relations, cascade, restart):
            options = cascade | restart << 1
            return b"T" + struct.pack(f">IB{len(relations)}I", len(relations), options, *relations)
        case Begin(lsn, time, xid):
            return b"B" + struct.pack(">QqI", lsn, time - _EPOCH_US, xid)
        case Commit(lsn, end, time):
            return b"C" + struct.pack(">BQQq", 0, lsn, end, time - _EPOCH_US)
        case Relation():
            out = [b"R", struct.pack(">I", message.id), message.namespace, b"\0", message.name, b"\0"]
            out += [message.identity.encode(), struct.pack(">H", len(message.columns))]
            for name, key, oid, typmod in message.columns:
                out += [bytes([key]), name, b"\0", struct.pack(">Ii", oid, typmod)]
            return b"".join(out)
    raise AssertionError(message)


columns = st.builds(Column, names, st.booleans(), ids, st.integers(-1, 2**31 - 1))
relations = st.builds(
    Relation, ids, names, names, st.sampled_from("dnfi"), st.lists(columns, max_size=5).map(tuple), st.just(b"")
).map(lambda relation: relation._replace(raw=encode(relation)))
updates = st.builds(Update, ids, st.none() | rows, st.booleans(), rows).map(
    lambda update: update._replace(old_is_key=False) if update.old is None else update
)
truncates = st.builds(Truncate, st.lists(ids, max_size=4).map(tuple), st.booleans(), st.booleans())
messages = st.one_of(
    st.builds(Insert, ids, rows), updates, st.builds(Delete, ids, rows, st.booleans()), truncates,
    st.builds(Begin, lsns, times, ids), st.builds(Commit, lsns, lsns, times), relations,
)  # fmt: skip


@given(messages)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


@given(messages, st.data())
def test_truncated(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(ProtocolError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(messages, st.binary(min_size=1, max_size=4))
def test_too_long(message: Message, more: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(encode(message) + more)


@given(st.sampled_from(list(b"BCORYIUDTMX")), st.binary(max_size=60))
def test_random_bytes(kind: int, rest: bytes) -> None:
    try:
        message = decode(bytes([kind]) + rest)
    except ProtocolError:
        return
    if bytes([kind]) not in b"OYM" and not isinstance(message, Relation | Commit | Truncate | Begin):
        assert encode(message) == bytes([kind]) + rest


@given(st.lists(messages.map(encode) | st.binary(max_size=30), max_size=12))
def test_any_messages_in_any_order(body: list[bytes]) -> None:
    try:
        pieces = list(transactions(body))
    except ProtocolError:
        return
    for piece in pieces:
        for change in expanded(piece.changes):
            if not isinstance(change, Truncated | Emitted):
                relation, row = change
                assert relation.id == row.relation_id
                assert len(row[-1] if isinstance(row, Insert | Update) else row.old) == len(relation.columns)


@st.composite
def frames(draw: st.DrawFn) -> list[bytes]:
    """Transactions of two tables, mostly as an origin sends them."""
    tables = [
        Relation(number, b"public", b"t%d" % number, "d", (Column(b"a", True, 23, -1),) * width, b"")
        for number, width in ((1, 2), (2, 1), (draw(st.sampled_from([1, 2, 3])), 3))
    ]
    body = [encode(table) for table in tables[: draw(st.sampled_from([2] * 6 + [0, 1, 3]))]]
    lsn = 0
    for _ in range(draw(st.integers(1, 4))):
        lsn += draw(st.sampled_from([1, 2, 3] * 6 + [0]))
        body.append(encode(Begin(lsn, _EPOCH_US, 1)))
        for _ in range(draw(st.integers(0, 6))):
            table = draw(st.sampled_from(tables[:2]))
            row = draw(st.tuples(*[values] * len(table.columns)))
            body += [encode(draw(st.sampled_from(tables)))] * draw(st.sampled_from([0] * 15 + [1]))
            key = row[:1] + (None,) * (len(row) - 1)
            kinds: list[Message] = [
                *[Insert(table.id, row)] * 2, Update(table.id, None, False, row), Update(table.id, key, True, row),
                Delete(table.id, key, True), Delete(table.id, row, False),
            ]  # fmt: skip
            change = draw(st.sampled_from(kinds))
            body.append(encode(change))
        body.append(encode(Commit(lsn, lsn + 1, _EPOCH_US + lsn)))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(body)))
        odd = draw(messages.map(encode) | st.binary(max_size=30) | st.sampled_from(body))
        body[at : at + draw(st.integers(0, 1))] = [odd]
    return body


@given(frames(), st.sampled_from([0, 0, 1, 2]))
def test_transactions_together_are_those_that_they_are_one_by_one(body: list[bytes], after: int) -> None:
    """What is refused one by one is never had together."""
    try:
        found = together(body, after)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            list(transactions(body))
        return
    if found is None:
        return
    pieces = list(transactions(body))
    lsns = [piece.commit.commit_lsn for piece in pieces if piece.begin is not None and piece.commit is not None]
    assert len(lsns) == len(pieces) == found.transactions and lsns == sorted(set(lsns)) and lsns[0] > after
    assert (found.first, found.last, found.commit_time_us) == (lsns[0], lsns[-1], pieces[-1].commit.commit_time_us)  # type: ignore[union-attr]
    one_by_one = [change for piece in pieces for change in expanded(piece.changes)]
    assert found.rows == len(one_by_one)

    def of_table(changes: list[Change], number: int) -> list[Change]:
        return [change for change in changes if not isinstance(change, Truncated | Emitted) and change[0].id == number]

    by_table = list(expanded(found.changes))
    assert len(by_table) == len(one_by_one)
    for number in range(1, 4):
        assert of_table(by_table, number) == of_table(one_by_one, number)


def test_many_small_transactions_are_had_together() -> None:
    rows = [encode(Insert(7, (b"%d" % n,))) for n in range(3)]
    body = [encode(TABLE)]
    for lsn in range(5, 8):
        body += [encode(Begin(lsn, _EPOCH_US, 1)), rows[lsn - 5], encode(Commit(lsn, lsn + 1, lsn))]
    found = together(body, 4)
    assert found is not None and (found.first, found.last, found.transactions, found.rows) == (5, 7, 3, 3)
    assert found.changes == [Inserted(decode(encode(TABLE)), rows)]  # type: ignore[arg-type]
    assert together(body, 5) is None and together(body[:-1], 4) is None
    assert together([*body[:-1], encode(Commit(8, 9, 7))], 4) is None


TABLE = Relation(7, b"public", b"t", "d", (Column(b"a", True, 23, -1),), b"")
OTHER = TABLE._replace(columns=(Column(b"a", False, 23, -1), Column(b"b", True, 25, -1)), identity="i")


def test_a_description_counts_from_where_it_stands() -> None:
    body = [
        encode(message)
        for message in (
            TABLE, Begin(5, _EPOCH_US, 1), Insert(7, (b"1",)), OTHER, Insert(7, (b"1", None)), Commit(5, 6, _EPOCH_US),
            Begin(9, _EPOCH_US, 2), Insert(7, (b"2", b"")),
        )
    ]  # fmt: skip
    first, second = transactions(body)
    assert (
        first.begin is not None and first.commit is not None and first.begin.final_lsn == first.commit.commit_lsn == 5
    )
    described = [change[0].columns for change in expanded(first.changes) if not isinstance(change, Truncated | Emitted)]
    assert described == [TABLE.columns, OTHER.columns]
    assert second.commit is None and second.begin == Begin(9, _EPOCH_US, 2)


def test_the_parts_of_a_large_transaction() -> None:
    begin, row, commit = (encode(m) for m in (Begin(5, _EPOCH_US, 1), Insert(7, (b"1",)), Commit(5, 6, _EPOCH_US)))
    table = encode(TABLE)
    assert [(p.begin is not None, len(p.changes), p.commit is not None) for p in transactions([table, begin, row])] == [
        (True, 1, False)
    ]
    assert [(p.begin, len(p.changes), p.commit) for p in transactions([table, row])] == [(None, 1, None)]
    assert [(p.begin, len(p.changes)) for p in transactions([table, row, commit])] == [(None, 1)]
    assert [(p.begin, len(p.changes)) for p in transactions([commit])] == [(None, 0)]
    for wrong in ([begin, begin], [table, row, begin], [begin, encode(Commit(6, 7, 0))], [commit, table, row], [row]):
        with pytest.raises(ProtocolError):
            list(transactions(wrong))


def test_a_row_of_another_width() -> None:
    with pytest.raises(ProtocolError):
        list(transactions([encode(TABLE), encode(Begin(5, 0, 1)), encode(Insert(7, (b"1", b"2")))]))


short = st.binary(max_size=255).filter(lambda value: b"\0" not in value) | st.sampled_from([b"", b"t", b"tt", b"n"])


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[short] * width), min_size=1, max_size=6)))
def test_values_of_many_rows_at_once(table: list[Row]) -> None:
    inserts = [encode(Insert(7, new)) for new in table]
    assert flat_values(inserts, len(table[0])) == [value for new in table for value in new]


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[values | short] * width), max_size=6)))
def test_values_that_are_cut_are_those_that_are_there(table: list[Row]) -> None:
    inserts = [encode(Insert(7, new)) for new in table]
    found = flat_values(inserts, len(table[0])) if table else None
    assert found is None or found == [value for message in inserts for value in read_row(message)]


def test_malformed_rows_are_not_cut() -> None:
    one, two, three = (encode(Insert(7, (b"x",) * width)) for width in (1, 2, 3))
    one, three = (message[:6] + two[6:8] + message[8:] for message in (one, three))
    assert flat_values([two, two], 2) == [b"x"] * 4
    for wrong in ([one, three], [one], [three, two], [two + b"n"], [two[:-1]], [b"I\0\0\0\7N\0\2"], [two, two[:9]]):
        assert flat_values(wrong, 2) is None
        with pytest.raises(ProtocolError):
            list(map(read_row, wrong))


@given(st.integers(1, 4).flatmap(lambda w: st.lists(st.tuples(*[short | st.none()] * w), min_size=1, max_size=6)))
def test_nulls_are_cut_too(table: list[Row]) -> None:
    inserts = [encode(Insert(7, new)) for new in table]
    assert flat_values(inserts, len(table[0])) == [value for new in table for value in new]
