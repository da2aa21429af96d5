"""A configuration tree in a backup: what is read comes back as it was, and nothing of a bad backup reaches the tree."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from pmgsync.core.manifests import Entry
from pmgsync.core.profile import FileTree
from pmgsync.errors import PmgsyncError, ProtocolError
from pmgsync.files.archive import Archived, archive_tree, restore_tree
from pmgsync.files.directories import FilesError

RULE = FileTree("config", "/etc/x", "", ("main.cf", "conf.d/"), ("own.pem",))


def read_all(path: Path) -> list[tuple[bytes, Entry, bytes | None]]:
    return [(each.name, each.entry, each.content.read() if each.content else None) for each in archive_tree(RULE, path)]


def write_back(taken: list[tuple[bytes, Entry, bytes | None]]) -> list[Archived]:
    return [Archived(name, entry, io.BytesIO(data) if data is not None else None) for name, entry, data in taken]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with a secret, an odd name, an empty directory, a large file, and what is not in a backup."""
    root = tmp_path / "tree"
    (root / "conf.d/empty").mkdir(parents=True)
    (root / "main.cf").write_text("main")
    (root / "main.cf").chmod(0o640)
    os.chown(root / "main.cf", 0, 33)
    os.utime(root / "main.cf", ns=(0, 1_234_567_890_123_456_789))
    Path(os.fsdecode(os.fsencode(root) + b"/conf.d/\xff\n")).write_bytes(b"\0\xff")
    (root / "conf.d/large").write_bytes(random.Random(1).randbytes(3 << 20))
    (root / "conf.d/same").write_text("main")
    (root / "conf.d/own.pem").write_text("this node's certificate")
    (root / "conf.d/link").symlink_to("/etc/passwd")
    (root / "other").write_text("not in the profile")
    return root


def test_a_tree_comes_back_as_it_was(tree: Path, tmp_path: Path) -> None:
    findings: dict[bytes, str] = {}
    taken = [
        (each.name, each.entry, each.content.read() if each.content else None)
        for each in archive_tree(RULE, tree, findings)
    ]
    names = [name for name, _, _ in taken]
    assert names == [b"conf.d", b"conf.d/empty", b"conf.d/large", b"conf.d/same", b"conf.d/\xff\n", b"main.cf"]
    assert "symbolic link" in findings[b"conf.d/link"]
    target = tmp_path / "new/etc"
    done = restore_tree(RULE, target, write_back(taken), keep_in=tmp_path / "kept")
    assert read_all(target) == taken
    status = (target / "main.cf").stat()
    assert (status.st_mode & 0o7777, status.st_gid, status.st_mtime_ns) == (0o640, 33, 1_234_567_890_123_456_789)
    assert done.kept == []
    assert not list((target / ".pmgsync/restore").iterdir())
    # A second time there is nothing to do.
    assert restore_tree(RULE, target, write_back(taken), keep_in=tmp_path / "kept").changed == []


def test_what_is_replaced_is_kept_and_what_is_not_named_stays(tree: Path, tmp_path: Path) -> None:
    taken = read_all(tree)
    (tree / "main.cf").write_text("edited since")
    (tree / "conf.d/new").write_text("made since")
    (tree / "conf.d/same").unlink()
    kept = tmp_path / "kept"
    done = restore_tree(RULE, tree, write_back(taken), keep_in=kept)
    assert sorted(done.changed) == [b"conf.d/same", b"main.cf"]
    assert (tree / "main.cf").read_text() == "main"
    assert (kept / "main.cf").read_text() == "edited since"
    assert (tree / "conf.d/new").read_text() == "made since"
    done = restore_tree(RULE, tree, write_back(taken), keep_in=kept, exact=True)
    assert done.changed == [b"conf.d/new"]
    assert (kept / "conf.d/new").read_text() == "made since"
    assert (tree / "conf.d/own.pem").exists()
    assert (tree / "other").exists()
    assert read_all(tree) == taken


def test_there_is_nothing_in_a_backup_of_no_tree(tmp_path: Path) -> None:
    assert read_all(tmp_path / "missing") == []
    assert not (tmp_path / "missing").exists()


def file(data: bytes, **other: object) -> Entry:
    return Entry("f", 0o644, "root", "root", len(data), 1)._replace(**other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        (b"../main.cf", file(b"x")),
        (b"conf.d/../../x", file(b"x")),
        (b"/etc/passwd", file(b"x")),
        (b"conf.d/" + b"n" * 256, file(b"x")),
        (b"conf.d/a\0b", file(b"x")),
        (b".pmgsync/marker", file(b"x")),
        (b"main.cf", file(b"xy")),
        (b"main.cf", file(b"x", mode=0o170644)),
        (b"main.cf", file(b"x", digest=b"\1" * 32)),
        (b"main.cf", file(b"x", kind="l")),
    ],
)
def test_a_bad_backup_changes_nothing(tree: Path, tmp_path: Path, name: bytes, entry: Entry) -> None:
    before = read_all(tree)
    items = [Archived(b"conf.d/good", file(b"good"), io.BytesIO(b"good")), Archived(name, entry, io.BytesIO(b"x"))]
    with pytest.raises(PmgsyncError):
        restore_tree(RULE, tree, items, keep_in=tmp_path / "kept")
    assert read_all(tree) == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tree"]


def test_a_name_below_a_file_and_a_file_without_content_are_refused(tree: Path, tmp_path: Path) -> None:
    below = [Archived(b"conf.d/a/b", file(b"x"), io.BytesIO(b"x")), Archived(b"conf.d/a", file(b"x"), io.BytesIO(b"x"))]
    for items in (below, [Archived(b"main.cf", file(b""))]):
        with pytest.raises(ProtocolError):
            restore_tree(RULE, tree, items, keep_in=tmp_path / "kept")
    assert (tree / "main.cf").read_text() == "main"


def test_what_the_profile_does_not_select_is_left_out(tree: Path, tmp_path: Path) -> None:
    items = [
        Archived(name, file(b"evil"), io.BytesIO(b"evil")) for name in (b"conf.d/own.pem", b"other", b"conf.d/good")
    ]
    done = restore_tree(RULE, tree, items, keep_in=tmp_path / "kept")
    assert done.changed == [b"conf.d/good"]
    assert [sentence.split()[0] for sentence in done.left_out] == ["conf.d/own.pem", "other"]
    assert (tree / "conf.d/own.pem").read_text() == "this node's certificate"


def test_no_link_is_followed(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("outside")
    (tree / "conf.d/sub").symlink_to(outside)
    (tree / "main.cf").unlink()
    (tree / "main.cf").symlink_to(outside / "x")
    items = [Archived(name, file(b"new"), io.BytesIO(b"new")) for name in (b"conf.d/sub/x", b"main.cf")]
    with pytest.raises(FilesError, match="symbolic link"):
        restore_tree(RULE, tree, items, keep_in=tmp_path / "kept")
    assert (outside / "x").read_text() == "outside"
    assert (tree / "main.cf").read_text() == "new"
    assert not (tree / "main.cf").is_symlink()
