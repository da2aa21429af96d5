"""Modes of what is made: the gateway's daemons get into its trees, nobody gets at the state directory's files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pmgsync.core.manifests import Entry
from pmgsync.files.cache import Cache
from pmgsync.files.directories import Root
from pmgsync.files.owners import group_name, user_name
from pmgsync.files.staging import Staging
from tests.files.pair import digest_of


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("value", [0o022, 0o077])
def test_the_umask_of_a_service_says_nothing_about_trees(tmp_path: Path, value: int) -> None:
    with umask(value), closing(Root(tmp_path / "spool", "cluster/2")) as root, root.directory(b"spam/a", create=True):
        pass
    for made in ("spool", "spool/cluster/2", "spool/cluster/2/spam/a"):
        assert (tmp_path / made).stat().st_mode & 0o777 == 0o755, made


def test_what_is_remembered_is_for_this_user_only(tmp_path: Path) -> None:
    with umask(0o022):
        cache = Cache(tmp_path / "state" / "files.db")
    try:
        assert {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "state").iterdir()} == dict.fromkeys(
            ("files.db", "files.db-wal", "files.db-shm"), 0
        )
    finally:
        cache.close()


@pytest.mark.parametrize("value", [0o000, 0o022, 0o077])
def test_a_staged_file_has_its_mode_whatever_the_umask_is(tmp_path: Path, value: int) -> None:
    user, group = user_name(os.geteuid()), group_name(os.getegid())
    with umask(value), closing(Root(tmp_path / "root")) as root, closing(Staging(root)) as area:
        for mode in (0o644, 0o600, 0o666, 0o755, 0o444, 0o4755, 0o2640, 0):
            content = f"{mode:o}".encode()
            digest = digest_of(content)
            area.put(digest, content, Entry("f", mode, user, group, len(content), 1_000_000_007, digest))
            status = (tmp_path / "root/.pmgsync/stage" / digest.hex()).stat()
            assert (status.st_mode & 0o7777, status.st_mtime_ns) == (mode, 1_000_000_007)
