"""Names from the network and the patterns of profiles."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.filenames import MAX_COMPONENT, Selection, check_name, parents, show
from pmgsync.errors import ProtocolError
from pmgsync.profile_file import load_profile

HOSTILE = [
    b"",
    b"/etc/passwd",
    b"..",
    b"../x",
    b"a/../../x",
    b"a/..",
    b"./a",
    b"a//b",
    b"a/",
    b"a\0b",
    b"x" * (MAX_COMPONENT + 1),
    b"/".join([b"d"] * 65),
    b"a/" * 1600 + b"b",
    b".pmgsync",
    b".pmgsync/marker",
    "text",
    None,
    7,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_could_leave_the_tree_is_refused(name: object) -> None:
    with pytest.raises(ProtocolError):
        check_name(name)


@pytest.mark.parametrize(
    "name", [b"a", b"a\nb", b"\xff\xfe", "ünïcode\u202e".encode(), b"x" * MAX_COMPONENT, b"...", b"-rf"]
)
def test_odd_names_are_names(name: bytes) -> None:
    assert check_name(name) == name
    shown = show(name)
    assert "\n" not in shown
    assert shown.isprintable()


@given(st.binary(max_size=300))
def test_no_name_that_is_taken_leads_out_of_the_root(name: bytes) -> None:
    try:
        check_name(name)
    except ProtocolError:
        return
    joined = posixpath.normpath(b"/root/" + name)
    assert joined.startswith(b"/root/")
    assert joined == b"/root/" + name


def test_parents() -> None:
    assert list(parents(b"a/b/c")) == [b"a", b"a/b"]
    assert list(parents(b"a")) == []


def test_the_gateways_configuration() -> None:
    tree = load_profile("pmg").files[0]
    selection = Selection(tree.include, tree.exclude)
    for name in (b"pmg.conf", b"dkim", b"dkim/default.private", b"templates/main.cf.in", b"acme/accounts/x/y"):
        assert selection.selects(name), name
    for name in (
        b"pmg-api.pem", b"pmg.conf~", b"templates/x.db", b"master/pmg.conf", b"cluster.conf", b"dkim/master/x",
        b"xpmg.conf",        b"templates/main.cf.pmgsync-20260101T000000", b".pmgsync/stage/x", b"pmg.conf/inner",
    ):  # fmt: skip
        assert not selection.selects(name), name


def test_wildcards_stay_within_one_part() -> None:
    selection = Selection(["conf.d/*.cf", "keys/", "x[ab]?"], ["keys/old/*", "[!a]*.tmp"])
    for name in (b"conf.d/a.cf", b"keys/k", b"keys/old", b"xa1", b"keys/a.tmp"):
        assert selection.selects(name), name
    for name in (b"conf.d", b"conf.d/sub/a.cf", b"keys/old/k", b"keys/old/k/deeper", b"xc1", b"xa", b"keys/b.tmp"):
        assert not selection.selects(name), name
    assert selection.enters(b"conf.d")
    assert not selection.enters(b"other")


@given(st.lists(st.sampled_from([b"a", b"b", b"c.x", b"d"]), min_size=1, max_size=4).map(b"/".join))
def test_what_is_selected_lies_in_directories_that_are_entered(name: bytes) -> None:
    selection = Selection(["a/", "b/c.x", "d/a/*"], ["*.y", "a/b"])
    if selection.selects(name):
        assert all(map(selection.enters, parents(name)))


@given(
    st.lists(
        st.sampled_from([b"a", b"spam", b".pmgsync", b".pmgsync-1", b"x.pmgsync-20260101", b"pmgsync"]),
        min_size=1,
        max_size=4,
    )
)
def test_without_patterns_the_same_is_selected_as_with_one_that_matches_nothing(parts: list[bytes]) -> None:
    name = b"/".join(parts)
    assert Selection([], []).selects(name) == Selection([], ["matches-nothing"]).selects(name)
