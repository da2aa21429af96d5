"""cluster.conf: every text comes back as it was, and a change touches what it must and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.cluster_conf import HOST_KEYS, ConfMember, Section, parse, render, with_members
from pmgsync.errors import ProtocolError

LINES = st.one_of(
    st.sampled_from(["master: 1", "node: 2", "node: 02", "node: x", "other: 3", "", "\t", "# said", "\tip 192.0.2.1"]),
    st.builds("\t{} {}".format, st.sampled_from([*HOST_KEYS, "ip", "maxcid", "name", "unknown"]), st.text("aZ0:. +/=")),
    st.text(st.characters(exclude_characters="\n")),
)
TEXTS = st.one_of(st.lists(LINES).map("\n".join), st.text())
VALUES = st.text("ABCdef0123:+/=.", min_size=1, max_size=20)
MEMBERS = st.lists(
    st.builds(
        ConfMember,
        cid=st.integers(1, 6),
        name=st.sampled_from(["pmg1", "pmg-2.example"]),
        address=st.sampled_from(["192.0.2.1", "2001:db8::1"]),
        master=st.just(False),
        host_keys=st.dictionaries(st.sampled_from(HOST_KEYS), VALUES),
    ),
    max_size=5,
    unique_by=lambda member: member.cid,
)

EXAMPLE = """master: 1
	fingerprint 5A:30
	hostrsapubkey AAAAhost
	ip 192.0.2.11
	maxcid 2
	name pmg1
	rootrsapubkey AAAAroot

node: 2
	ip 192.0.2.12
	name pmg2
"""


def own(sections: Sequence[Section]) -> dict[int, Section]:
    return {section.cid: section for section in sections if section.cid}


@given(TEXTS)
def test_every_text_comes_back_as_it_was(text: str) -> None:
    assert render(parse(text)) == text


def test_an_example() -> None:
    sections = own(parse(EXAMPLE))
    assert sections[1].kind == "master"
    assert sections[1].values["hostrsapubkey"] == "AAAAhost"
    assert sections[2].values == {"ip": "192.0.2.12", "name": "pmg2"}


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=4)))
def test_every_optional_line_may_be_there_or_not(present: tuple[bool, ...]) -> None:
    optional = dict(zip((*HOST_KEYS, "maxcid"), present, strict=True))
    lines = [line for line in EXAMPLE.split("\n") if optional.get(line.split(" ")[0].strip(), True)]
    text = "\n".join(lines)
    known = {"fingerprint": "5A:30", "hostrsapubkey": "AAAAhost", "rootrsapubkey": "AAAAroot"}
    members = [
        ConfMember(1, "pmg1", "192.0.2.11", True, {key: value for key, value in known.items() if optional[key]}),
        ConfMember(2, "pmg2", "192.0.2.12", False, {}),
    ]
    changed = render(with_members(parse(text), members, 2))
    if optional["maxcid"]:
        assert changed == text, "nothing to change, nothing changed"
    else:
        assert sorted(changed.split("\n")) == sorted([*lines, "\tmaxcid 2"])
    for key in HOST_KEYS:
        assert (f"\t{key} " in changed) == optional[key]


def test_a_new_file() -> None:
    members = [ConfMember(2, "pmg2", "192.0.2.12", False, {}), ConfMember(1, "pmg1", "192.0.2.11", True, {})]
    assert render(with_members(parse(""), members, 3)) == (
        "node: 1\n".replace("node", "master")
        + "\tip 192.0.2.11\n\tmaxcid 3\n\tname pmg1\n\nnode: 2\n\tip 192.0.2.12\n\tname pmg2\n"
    )


def test_a_promotion_a_node_that_left_and_lines_that_nobody_here_knows() -> None:
    text = (
        "# kept\n\nmaster: 1\n\tip 192.0.2.11\n\tmaxcid 3\n\tname pmg1\n\nnode: 3\n\tname gone\n\nnode: 2\n\tweight 7\n"
    )
    text += "\tip 192.0.2.12\n\tfingerprint AA\n\nother: x\n\tmaxcid 9\n"
    members = [ConfMember(1, "pmg1", "192.0.2.11", False, {}), ConfMember(2, "pmg2", "192.0.2.12", True, {})]
    assert render(with_members(parse(text), members, 3)) == (
        "# kept\n\nnode: 1\n\tip 192.0.2.11\n\tname pmg1\n\n"
        "master: 2\n\tweight 7\n\tip 192.0.2.12\n\tfingerprint AA\n\tmaxcid 3\n\tname pmg2\n\nother: x\n\tmaxcid 9\n"
    )


@given(TEXTS, MEMBERS, st.integers(1, 9))
def test_a_change_leaves_exactly_the_members_and_all_lines_of_others(
    text: str, members: list[ConfMember], max_cid: int
) -> None:
    before = parse(text)
    after = with_members(before, members, max_cid)
    assert with_members(after, members, max_cid) == after, "twice is once"
    assert render(with_members(parse(render(after)), members, max_cid)) == render(after), "nor does reading it again"
    found = own(after)
    assert set(found) == {member.cid for member in members}
    for member in members:
        values = found[member.cid].values
        assert (values["ip"], values["name"]) == (member.address, member.name)
        assert "maxcid" not in values
        assert {key: values[key] for key in member.host_keys} == dict(member.host_keys)
    foreign = [line for section in before if section.kind not in {"master", "node"} for line in section.lines]
    kept = render(after).split("\n")
    assert [line for line in foreign if line.strip()] == [
        line for section in after if section.kind not in {"master", "node"} for line in section.lines if line.strip()
    ]
    assert all(line in kept for line in foreign if line.strip())


@given(st.sampled_from(["a\nnode: 9", "", " x", "x\r", "x\0"]))
def test_a_value_cannot_make_lines(value: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be the fingerprint"):
        with_members(parse(EXAMPLE), [ConfMember(1, "pmg1", "192.0.2.11", True, {"fingerprint": value})], 1)
