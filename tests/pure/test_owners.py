"""Of any row exactly one member answers for it, whatever stands in its owner column; and what counts unread is what
counts read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.changes import Deleted, Inserted, Updated
from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import UNCHANGED, Column, Delete, Insert, Relation, Row, RowChange, Update, Value, decode
from pmgsync.core.policies import counts_wholly, select, select_unread
from pmgsync.core.profile import Policy, TableRule
from pmgsync.errors import ApplyError
from tests.pure.test_pgoutput import encode

members = st.frozensets(st.integers(1, 40), min_size=1)
numbers = st.integers(-3, 45).map(lambda number: b"%d" % number)
values = (
    st.none() | st.just(UNCHANGED) | st.binary(max_size=4) | numbers | numbers.map(lambda text: b" " + text + b"  ")
)


@given(members, st.data(), values)
def test_one_member_answers(cids: frozenset[int], data: st.DataObject, owner: Value) -> None:
    master = data.draw(st.sampled_from(sorted(cids)))
    answering = [cid for cid in cids if Writers.at(cid, master, cids).answers_for(owner)]
    assert len(answering) == 1
    text = owner.strip(b" ") if isinstance(owner, bytes) else b""
    assert answering == [int(text) if text in {b"%d" % cid for cid in cids} else master]


rules = st.sampled_from(
    [
        TableRule("public", "t", Policy.OWNED, owner="o"),
        TableRule("public", "t", Policy.MERGE, deletes=False),
        TableRule("public", "t", Policy.MERGE, deletes=True, inserts_by_owner="o"),
        TableRule("public", "t", Policy.MERGE, deletes=False, inserts_by_owner="o"),
    ]
)


@given(members, st.data(), rules, st.booleans(), st.integers(0, 2), st.lists(st.tuples(*[values] * 3), max_size=6))
def test_what_counts_unread_is_what_counts_read(
    cids: frozenset[int], data: st.DataObject, rule: TableRule, in_key: bool, place: int, rows: list[Row]
) -> None:
    origin, master = (data.draw(st.sampled_from(sorted(cids))) for _ in range(2))
    writers = Writers.at(origin, master, cids)
    columns = tuple(Column(b"o" if at == place else b"x", in_key or at != place, 25, -1) for at in range(3))
    relation = Relation(7, b"public", b"t", "d", columns, b"")
    owner = place if rule.owner or rule.inserts_by_owner else None
    assert counts_wholly(rule, writers) is None
    kinds: list[tuple[type[Inserted | Updated | Deleted], list[RowChange]]] = [
        (Inserted, [Insert(7, row) for row in rows]),
        (Updated, [Update(7, None, False, row) for row in rows]),
        (Deleted, [Delete(7, row, True) for row in rows]),
    ]
    for kind, changes in kinds:
        messages = [encode(change) for change in changes]
        try:
            found = select_unread(rule, relation, kind(relation, messages), writers, owner)
        except ApplyError:
            found = None
        try:
            selected = [select(rule, relation, change, writers, owner) for change in changes]
        except ApplyError:
            assert found is None
            continue
        kept = [change for change in selected if change is not None]
        if found is None:
            assert not changes, "an error without a row that it is about"
        else:
            assert type(found) is kind and list(map(decode, found.messages)) == kept
