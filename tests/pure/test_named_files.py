"""Files that rows name: which of them are waited for, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.named_files import SHARE, NamedFile, Patience, is_expected, naming_of
from pmgsync.core.profile import FileTree
from pmgsync.core.trees import Tree
from pmgsync.errors import ConfigError
from pmgsync.profile_file import load_profile
from tests.pure.test_profile import write

SPOOL = FileTree("spool", "/var/spool/pmg", include=("spam/",), exclude=("*~",), tree="cluster/{cid}")
TREES = [Tree(f"/var/spool/pmg/cluster/{cid}", SPOOL, f"cluster/{cid}", owner) for cid, owner in ((1, 1), (2, 1))]


@pytest.mark.parametrize(
    ("path", "origin", "expected"),
    [
        (b"cluster/1/spam/0a/x", 1, True),
        (b"cluster/2/spam/\xff\n", 1, True),  # node 2 is gone, the master answers for its spool
        (b"cluster/1/spam/0a/x", 3, False),
        (b"spam/0a/x", 1, False),
        (b"cluster/1/spam/../../2/spam/x", 1, False),
        (b"/var/spool/pmg/cluster/1/spam/x", 1, False),
        (b"cluster/1/spam/x~", 1, False),
        (b"cluster/1/virus/x", 1, False),
        (b"cluster/1/", 1, False),
        (b"cluster/11/spam/x", 1, False),
        (b"cluster/1/spam/x\0", 1, False),
    ],
)
def test_only_what_the_writer_of_the_row_has_is_waited_for(path: bytes, origin: int, *, expected: bool) -> None:
    assert is_expected(NamedFile(SPOOL, path), TREES, origin) is expected
    other = FileTree("spool", "/elsewhere", tree="cluster/{cid}")
    assert not is_expected(NamedFile(other, path), TREES, origin)


def test_a_profile_says_which_columns_name_files(tmp_path: object) -> None:
    assert naming_of(load_profile("mirror")) == {}
    profile = load_profile("pmg")
    assert naming_of(profile) == {(b"public", b"cmailstore"): {b"file": profile.files[2]}}


@pytest.mark.parametrize(
    ("kind", "named_in", "wrong"),
    [
        ('"spool"\ntree = "{cid}"', '["t"]', "table.column"),
        ('"spool"\ntree = "{cid}"', '["x.a"]', "names the table 'x'"),
        ('"config"\ninclude = ["a"]', '["t.a"]', "expected for a spool"),
    ],
)
def test_mistakes_about_them_are_named(tmp_path, kind: str, named_in: str, wrong: str) -> None:  # type: ignore[no-untyped-def]
    text = f'[tables.t]\npolicy = "mirror"\n[[files]]\nroot = "/x"\nkind = {kind}\nnamed_in = {named_in}\n'
    with pytest.raises(ConfigError, match="named_in") as error:
        load_profile(write(tmp_path, text))
    assert wrong in str(error.value)


def test_a_row_waits_from_when_it_came() -> None:
    patience = Patience(5)
    assert patience.until(100, 100) == 105
    assert patience.until(103, 100) == 105
    assert patience.until(107, 100) == 105  # it goes on at once
    patience.failed(105)
    assert patience.until(105, 105) == 105
    assert patience.until(115, 115) == 116
    assert patience.until(1000, 1000) == 1005


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=50), st.floats(0.1, 10))
def test_files_that_do_not_come_hold_a_chain_up_by_little(steps: list[tuple[float, bool]], limit: float) -> None:
    """Each step: time that passes otherwise, then a row that came just now and waits, for a file that comes or not."""
    patience, now, waited, started = Patience(limit), 0.0, 0.0, 0.0
    for passes, comes in steps:
        now += passes
        if comes:
            continue
        until = max(patience.until(now, now), now)
        waited += until - now
        now = until
        patience.failed(now)
    assert waited <= limit + SHARE * (now - started) + 1e-6
