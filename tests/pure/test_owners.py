"""Of any row exactly one member answers for it, whatever stands in its owner column."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.owners import Writers
from pmgsync.core.pgoutput import UNCHANGED, Value

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
