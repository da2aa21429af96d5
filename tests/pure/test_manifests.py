"""Manifests: their digest follows each change, and the plan of a pass leads from any tree to any other."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmgsync.core.filenames import parents
from pmgsync.core.manifests import Change, Entry, Manifest, changes_between, pack_changes, unpack_changes
from pmgsync.core.renames import Step, check_shape, plan_pass
from pmgsync.errors import ProtocolError

NAMES = [b"a", b"a/b", b"a/b/c", b"a/d", b"e", b"e/f", b"\xff\n", b"g"]
FILES = st.builds(
    lambda mode, content: Entry("f", mode, "root", "root", len(content), 7, content.ljust(32, b"\0")),
    st.sampled_from([0o600, 0o644]),
    st.sampled_from([b"x", b"yy", b"zzz"]),
)
DIRECTORIES = st.builds(lambda mode: Entry("d", mode, "root", "root"), st.sampled_from([0o700, 0o755]))


@st.composite
def trees(draw: st.DrawFn) -> Manifest:
    """A tree as a file system can hold it: every outer name is a directory."""
    found: dict[bytes, Entry] = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        outers = list(parents(name))
        if any(outer in found and found[outer].kind == "f" for outer in outers):
            continue
        for outer in outers:
            found.setdefault(outer, draw(DIRECTORIES))
        if name not in found:
            found[name] = draw(st.one_of(FILES, DIRECTORIES))
    return Manifest(found.items())


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(st.none(), FILES, DIRECTORIES))))
def test_the_digest_depends_on_the_entries_alone(changes: list[Change]) -> None:
    manifest = Manifest()
    for name, entry in changes:
        manifest.set(name, entry)
    again = Manifest(sorted(manifest.items()))
    assert manifest == again
    assert manifest.digest == again.digest
    assert manifest.sums() == again.sums()
    assert (manifest.files, manifest.bytes) == (again.files, again.bytes)


@given(trees(), trees())
def test_changes_lead_from_one_to_the_other(old: Manifest, new: Manifest) -> None:
    changed = old.copy()
    for name, entry in unpack_changes(pack_changes(changes_between(old, new))):
        changed.set(name, entry)
    assert changed == new
    assert changed.digest == new.digest
    assert (old.digest == new.digest) == (old == new)


@given(trees(), trees())
def test_groups_that_differ_are_enough(ours: Manifest, theirs: Manifest) -> None:
    groups = ours.differing(theirs.sums())
    assert bool(groups) == (ours != theirs)
    for name, entry in ours.with_buckets(groups, dict(theirs.in_buckets(groups))):
        ours.set(name, entry)
    assert ours == theirs


def _do(tree: dict[bytes, Entry], step: Step) -> None:
    """A file system, in as far as it refuses."""
    if step.what == "remove":
        assert not any(name.startswith(step.name + b"/") for name in tree), f"{step.name!r} is not empty"
        tree.pop(step.name, None)
        return
    assert step.entry is not None
    for outer in parents(step.name):
        assert tree[outer].kind == "d"
    there = tree.get(step.name)
    assert there is None or there.kind == step.entry.kind, f"{step.name!r} is in the way"
    if step.what == "set":
        assert step.entry.same_content(there)
    tree[step.name] = step.entry


@given(trees(), trees(), trees())
def test_a_pass_leads_to_what_is_wanted_and_loses_nothing_that_was_written_here(
    wanted: Manifest, actual: Manifest, held: Manifest
) -> None:
    tree = dict(actual.items())
    kept = set()
    for step in plan_pass(wanted.entries, actual.entries, held.entries, {*wanted, *actual}):
        if step.keep:
            kept.add(tree[step.name].digest)
        _do(tree, step)
    assert Manifest(tree.items()) == wanted
    for name, entry in actual.items():
        local = entry.kind == "f" and not entry.same_content(held.get(name))
        assert not local or entry.same_content(wanted.get(name)) or entry.digest in kept


@given(trees(), trees())
def test_a_pass_between_equal_trees_is_empty(tree: Manifest, held: Manifest) -> None:
    assert plan_pass(tree.entries, tree.entries, held.entries, list(tree)) == []


@given(trees(), trees())
def test_every_tree_has_a_possible_shape(old: Manifest, new: Manifest) -> None:
    check_shape(new, changes_between(old, new))


def test_an_impossible_shape_is_refused() -> None:
    file = Entry("f", 0o600, "root", "root", 1, 1, b"x" * 32)
    changes: list[Change] = [(b"a", file), (b"a/b", file)]
    with pytest.raises(ProtocolError, match="below a"):
        check_shape(Manifest((name, entry) for name, entry in changes if entry), changes)


GOOD = [b"a", "f", 0o600, "root", "root", 1, 1, b"x" * 32]
BAD = {
    "no list": 7,
    "a name that leaves": [[b"../a"]],
    "another kind": [[b"a", "l", *GOOD[2:]]],
    "mode too big": [[b"a", "f", 0o10000, *GOOD[3:]]],
    "a negative size": [[*GOOD[:5], -1, 1, b"x" * 32]],
    "a flag for a number": [[*GOOD[:5], True, 1, b"x" * 32]],
    "a short digest": [[*GOOD[:7], b"x"]],
    "a digest of a directory": [[b"a", "d", 0o700, "root", "root", 0, 0, b"x" * 32]],
    "a user that is no text": [[*GOOD[:3], b"root", *GOOD[4:]]],
    "too many": [[*GOOD, 1]],
}


@pytest.mark.parametrize("what", BAD)
def test_entries_that_are_none_are_refused(what: str) -> None:
    with pytest.raises(ProtocolError):
        unpack_changes(msgpack.packb(BAD[what]))
    assert unpack_changes(msgpack.packb([GOOD])) == [(b"a", Entry("f", 0o600, "root", "root", 1, 1, b"x" * 32))]


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_are_entries_or_refused(data: bytes) -> None:
    try:
        unpack_changes(data)
    except ProtocolError:
        return
