"""Which trees a cluster has, who answers for them, and what a change asks for."""

from __future__ import annotations

import pytest

from pmgsync.core.membership import ClusterDocument, without_member
from pmgsync.core.trees import EMPTIED_SPOOL, looks_vanished, profile_path, touched_actions, trees_of
from pmgsync.profile_file import load_profile
from tests.pure.test_membership import grown

SPOOL = "/var/spool/pmg/cluster/"


def _document(*, gone: int) -> ClusterDocument:
    return without_member(grown(3), gone)


def test_spools_of_nodes_that_are_gone_are_the_masters() -> None:
    document = _document(gone=2)
    trees = trees_of(load_profile("pmg"), document)
    assert trees["/etc/pmg"].owner == document.master
    for cid in range(1, document.max_cid + 1):
        expected = document.master if document.member(cid) is None else cid
        assert trees[f"{SPOOL}{cid}"].owner == expected
        assert trees[f"{SPOOL}{cid}"].below == f"cluster/{cid}"


@pytest.mark.parametrize("before", [0, 1, 2, EMPTIED_SPOOL - 1, EMPTIED_SPOOL])
def test_a_tree_that_is_emptied_at_once(before: int) -> None:
    assert not looks_vanished(before, 1, config=True)
    assert looks_vanished(before, 0, config=True) == (before >= 2)
    assert looks_vanished(before, 0, config=False) == (before >= EMPTIED_SPOOL)


def test_actions_of_files_and_tables_each_once() -> None:
    profile = load_profile("pmg")
    trees = trees_of(profile, _document(gone=2))
    tree = trees["/etc/mail/spamassassin"]
    path = profile_path(tree, b"custom.cf")
    assert path == b"/etc/mail/spamassassin/custom.cf"
    restart, reload = ("systemctl", "restart", "pmg-smtp-filter"), ("systemctl", "reload", "pmg-smtp-filter")
    assert touched_actions(profile, [path, profile_path(tree, b"pmg-scores.cf")], []) == [restart]
    assert touched_actions(profile, [], ["rule", "object"]) == [reload]
    assert touched_actions(profile, [path], ["rule"]) == [restart, reload]
    assert touched_actions(profile, [b"/etc/mail/spamassassin/other"], ["userprefs"]) == []
