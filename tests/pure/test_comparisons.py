"""What differs between nodes, and who has it right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.comparisons import Difference, Row, compare_rows, compare_trees, differing_chunks, in_groups, lasting
from pmgsync.core.manifests import Entry
from pmgsync.core.profile import MergeRule, Policy, TableRule

MEMBERS = (1, 2, 3)
ROWS = st.dictionaries(
    st.sampled_from([b"a", b"b", b"c"]),
    st.tuples(st.sampled_from([b"x", b"y"]), st.sampled_from([b"1", b"2", b"9", b"none"])),
)
ANSWERS = st.fixed_dictionaries(dict.fromkeys(MEMBERS, ROWS))
MIRROR = TableRule("public", "t", Policy.MIRROR)
OWNED = TableRule("public", "t", Policy.OWNED, owner="cid")


def _repaired(answers: dict[int, dict[bytes, Row]], found: list[Difference]) -> dict[int, dict[bytes, Row]]:
    after = {cid: dict(rows) for cid, rows in answers.items()}
    for each in found:
        right = answers[each.source].get(each.key)
        if right is None:
            after[each.cid].pop(each.key, None)
        else:
            after[each.cid][each.key] = right
    return after


@given(ANSWERS)
def test_mirrored_rows_are_right_on_the_master(answers: dict[int, dict[bytes, Row]]) -> None:
    found = compare_rows(MIRROR, answers, master=1, members=MEMBERS)
    assert all(each.source == 1 != each.cid for each in found)
    after = _repaired(answers, found)
    assert after[2] == after[3] == answers[1]


@given(ANSWERS)
def test_owned_rows_are_right_on_one_node_each(answers: dict[int, dict[bytes, Row]]) -> None:
    found = compare_rows(OWNED, answers, master=1, members=MEMBERS)
    after = _repaired(answers, found)
    assert after[1] == after[2] == after[3]
    assert bool(found) == (not answers[1] == answers[2] == answers[3])


def test_a_row_of_a_node_that_is_gone_is_the_masters() -> None:
    answers: dict[int, dict[bytes, Row]] = {1: {b"k": (b"x", b"9")}, 2: {b"k": (b"y", b"9")}}
    (found,) = compare_rows(OWNED, answers, master=1, members=(1, 2))
    assert (found.cid, found.source, found.kind) == (2, 1, "differs")


def test_merged_rows_that_expire_may_be_missing() -> None:
    rules = {"v": MergeRule("greatest")}
    answers: dict[int, dict[bytes, Row]] = {1: {b"k": (b"x", b"")}, 2: {b"k": (b"y", b"")}, 3: {}}
    stays = TableRule("public", "t", Policy.MERGE, rules=rules)
    expires = TableRule("public", "t", Policy.MERGE, rules=rules, deletes=False)
    assert {(d.cid, d.source) for d in compare_rows(stays, answers, master=1, members=MEMBERS)} == {
        (1, 2), (2, 1), (3, 1), (3, 2)
    }  # fmt: skip
    assert {(d.cid, d.source) for d in compare_rows(expires, answers, master=1, members=MEMBERS)} == {(1, 2), (2, 1)}


@given(st.dictionaries(st.integers(1, 3), st.dictionaries(st.integers(0, 5), st.tuples(st.integers(1), st.integers()))))
def test_chunks_differ_where_anybody_has_another_sum(answers: dict[int, dict[int, tuple[int, int]]]) -> None:
    for number in range(6):
        sums = [held.get(number) for held in answers.values()]
        assert (number in differing_chunks(answers)) == any(each != sums[0] for each in sums)


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 50)), st.integers(1, 60))
def test_every_chunk_is_in_one_group_and_no_group_is_too_large(rows: dict[int, int], most: int) -> None:
    answers = {1: {chunk: (count, 0) for chunk, count in rows.items()}, 2: {}}
    groups = in_groups(sorted(rows), answers, most)
    assert [chunk for group in groups for chunk in group] == sorted(rows)
    assert all(group for group in groups)
    assert all(len(group) == 1 or sum(rows[chunk] for chunk in group) <= most for group in groups)


def test_files_that_were_purged_elsewhere_are_no_difference_in_a_spool() -> None:
    entry = Entry("f", 0o600, "root", "root", 1, 1, b"x" * 32)
    other = entry._replace(mode=0o644)
    right = {b"a": entry, b"b": entry}
    answers: dict[int, dict[bytes, Entry | None]] = {2: {b"a": None, b"b": other}, 3: {b"b": entry, b"c": entry}}
    found = compare_trees(1, right, answers, config=False)
    assert [(d.cid, d.key, d.kind) for d in found] == [(3, b"a", "missing"), (3, b"c", "extra")]
    gone = compare_trees(1, right, answers, config=False, gone=True)
    assert [(d.cid, d.key, d.kind) for d in gone] == [(3, b"a", "missing")]
    strict = compare_trees(1, right, answers, config=True)
    assert (2, b"b", "differs") in [(d.cid, d.key, d.kind) for d in strict]
    assert lasting(found, strict) == sorted(found)
