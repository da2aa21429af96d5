"""A tree on a real disk: scanned once, followed by its watch, and stopped when its disk seems to be gone."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from pmgsync.core.filenames import Selection
from pmgsync.core.manifests import Change, Entry
from pmgsync.core.profile import FileTree
from pmgsync.core.trees import Tree
from pmgsync.files import local as local_module
from pmgsync.files import scan as scan_module
from pmgsync.files import watch as watch_module
from pmgsync.files.cache import Cache
from pmgsync.files.directories import FilesError, Root, TreeStoppedError
from pmgsync.files.local import LocalTree
from pmgsync.files.scan import Found, Limits, Scanner
from tests.harness.cluster import eventually

SPOOL = Tree("/spool/cluster/1", FileTree("spool", "/spool", "", (), (), "cluster/{cid}"), "cluster/1", 1)
CONFIG = Tree("/etc/x", FileTree("config", "/etc/x", "", ("conf.d/", "main.cf"), ("*~",)), "", 1)
ODD = [b"plain", b"\xff\xfe\x80", b"new\nline", "ü\u202e".encode(), b"-rf", b"x" * 255, b"sp ace"]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    opened = Cache(tmp_path / "state" / "files.db")
    yield opened
    opened.close()


@pytest.fixture
def new_tree(tmp_path: Path, cache: Cache) -> Iterator[Callable[[Tree], LocalTree]]:
    made: list[LocalTree] = []

    def make(tree: Tree) -> LocalTree:
        made.append(LocalTree(tree, tmp_path / "root", cache, Limits()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def settled(tree: LocalTree) -> list[Change]:
    """Return all changes once everything that is on the disk has been hashed."""
    found = tree.changes()

    def done() -> bool:
        found.extend(tree.changes())
        return not tree.found.unsettled

    eventually(done, what="a tree that is at rest")
    return found


def until_known(tree: LocalTree, condition: Callable[[], bool]) -> None:
    """Follow the watch until it has told of something."""

    def told() -> bool:
        tree.changes()
        return condition()

    eventually(told, within_s=10, what="a change that the watch tells of")


def test_any_name_is_found_by_scan_and_watch(new_tree: Callable[[Tree], LocalTree], tmp_path: Path) -> None:
    tree = new_tree(SPOOL)
    spool = os.fsencode(tmp_path / "root/cluster/1")
    os.makedirs(spool + b"/spam")
    settled(tree)
    for name in ODD:
        with open(spool + b"/spam/" + name, "wb") as file:
            file.write(name * 3)
    until_known(tree, lambda: tree.found.manifest.files == len(ODD))
    assert {name for name in tree.found.manifest if b"/" in name} == {b"spam/" + name for name in ODD}
    os.unlink(spool + b"/spam/" + ODD[1])
    os.rename(spool + b"/spam", spool + b"/virus")
    until_known(tree, lambda: b"virus/plain" in tree.found.manifest and b"spam" not in tree.found.manifest)
    with open(spool + b"/virus/late", "wb") as file:
        file.write(b"x")
    until_known(tree, lambda: b"virus/late" in tree.found.manifest)
    scanned = Scanner(Root(tmp_path / "root", "cluster/1"), Selection((), ()), Limits(), Found())
    eventually(lambda: not (scanned.scan() and scanned.found.unsettled))
    assert scanned.found.manifest == tree.found.manifest


def test_a_tree_at_rest_is_not_hashed_again(new_tree: Callable[[Tree], LocalTree], tmp_path: Path) -> None:
    first = new_tree(CONFIG)
    (tmp_path / "root/conf.d").mkdir()
    for number in range(50):
        (tmp_path / f"root/conf.d/{number}").write_text(str(number))
    (tmp_path / "root/main.cf").write_text("main")
    (tmp_path / "root/main.cf~").write_text("backup")
    (tmp_path / "root/other").write_text("not selected")
    settled(first)
    assert first.found.manifest.files == 51
    first.close()
    again = new_tree(CONFIG)
    assert again.changes() == []
    assert again.found.hashed == 0
    assert again.found.manifest == first.found.manifest
    # Same size and time of change, set back as a program may do: the inode's own time tells.
    path = tmp_path / "root/conf.d/7"
    before = path.stat()
    path.write_text("8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    until_known(again, lambda: again.found.hashed > 0)
    settled(again)
    assert again.found.manifest.get(b"conf.d/7") != first.found.manifest.get(b"conf.d/7")


def test_what_is_no_file_is_left_out_with_a_finding(new_tree: Callable[[Tree], LocalTree], tmp_path: Path) -> None:
    root = tmp_path / "root/cluster/1"
    root.mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (root / "link").symlink_to(secret / "key")
    (root / "directory").symlink_to(secret)
    os.mkfifo(root / "pipe")
    (root / "file").write_text("x")
    short = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(short))
        os.rename(short, root / "socket")
    tree = new_tree(SPOOL)
    settled(tree)
    assert set(tree.found.manifest) == {b"file"}
    told = "\n".join(sorted(tree.found.findings.values()))
    for kind in ("a symbolic link", "a named pipe", "a socket"):
        assert kind in told
    # A file that turns into something else is gone for the others.
    (root / "file").unlink()
    (root / "file").symlink_to(secret / "key")
    until_known(tree, lambda: len(tree.found.manifest) == 0)


def test_what_cannot_be_read_is_not_taken_to_be_gone(tmp_path: Path, cache: Cache) -> None:
    root = tmp_path / "root"
    (root / "conf.d/inner").mkdir(parents=True)
    (root / "conf.d/inner/a").write_text("a")
    (root / "main.cf").write_text("main")
    scanner = Scanner(Root(root), Selection(CONFIG.rule.include, ()), Limits())
    eventually(lambda: scanner.scan() is not None and not scanner.found.unsettled)
    (root / "conf.d/inner").chmod(0)
    child = os.fork()
    if child == 0:  # root reads everything, another user does not
        os.chmod(root, 0o755)
        os.setuid(65534)
        changes = scanner.scan()
        told = " ".join(scanner.found.findings.values())
        kept = b"conf.d/inner/a" in scanner.found.manifest
        os._exit(
            0 if kept and "nobody may not" in told and str(root / "conf.d/inner") in told and len(changes) <= 1 else 1
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_limits(new_tree: Callable[[Tree], LocalTree], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number in range(5):
        (root / str(number)).write_bytes(b"x" * number)
    scanner = Scanner(Root(root), Selection((), ()), Limits(max_size=2, max_count=4))
    eventually(lambda: scanner.scan() is not None and not scanner.found.unsettled)
    assert sorted(scanner.found.manifest) == [b"0", b"1", b"2"]
    assert "4 bytes, 2 are allowed" in scanner.found.findings[b"4"]
    for number in range(5, 8):
        (root / str(number)).write_bytes(b"")

    def too_many() -> bool:
        try:
            scanner.scan()
        except FilesError as error:
            return "more than 4" in error.message
        return False

    eventually(too_many)


def test_an_emptied_tree_stops_until_somebody_says_that_it_is_right(
    new_tree: Callable[[Tree], LocalTree], tmp_path: Path
) -> None:
    tree = new_tree(CONFIG)
    root = tmp_path / "root"
    (root / "conf.d").mkdir()
    for number in range(4):
        (root / f"conf.d/{number}").write_text("x")
    settled(tree)
    shutil.rmtree(root / "conf.d")

    def stopped() -> bool:
        try:
            tree.changes()
        except TreeStoppedError as error:
            return "gone at once" in error.message and "--accept /etc/x" in error.hint
        return False

    eventually(stopped)
    assert stopped()  # and it stays
    assert tree.found.manifest.files == 4
    tree.accept()
    gone = {name for name, entry in tree.changes() if entry is None}
    assert gone == {b"conf.d", b"conf.d/0", b"conf.d/1", b"conf.d/2", b"conf.d/3"}


def test_a_tree_without_its_marker_stops(new_tree: Callable[[Tree], LocalTree], tmp_path: Path) -> None:
    tree = new_tree(CONFIG)
    (tmp_path / "root/main.cf").write_text("x")
    settled(tree)
    tree.close()
    # An unmounted disk leaves the empty directory that it was mounted on.
    (tmp_path / "root").rename(tmp_path / "disk")
    (tmp_path / "root").mkdir()
    with pytest.raises(TreeStoppedError, match="marker"):
        new_tree(CONFIG)
    (tmp_path / "root").rmdir()
    (tmp_path / "disk").rename(tmp_path / "root")
    assert new_tree(CONFIG).changes() == []


def test_lost_events_are_made_up_for_by_a_scan(
    new_tree: Callable[[Tree], LocalTree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = new_tree(CONFIG)
    (tmp_path / "root/conf.d").mkdir()
    settled(tree)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    path = tmp_path / "root/conf.d/busy"
    other = tmp_path / "root/conf.d/other"
    # Two names in turn, for the kernel joins equal events that follow one another.
    for _ in range(limit // 2 + 10):
        path.touch()
        other.touch()
    (tmp_path / "root/conf.d/late").write_text("late")
    touched = watch_module.Watch.take
    losses = []

    def take(self: watch_module.Watch) -> watch_module.Touched:
        found = touched(self)
        losses.append(found.lost)
        return found

    monkeypatch.setattr(watch_module.Watch, "take", take)
    until_known(tree, lambda: b"conf.d/late" in tree.found.manifest)
    assert any(losses)


def test_a_damaged_cache_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "files.db"
    path.write_bytes(b"this is no database" * 1000)
    cache = Cache(path)
    assert cache.fact("/etc/x", "marked") == ""
    cache.note("/etc/x", "marked", "yes")
    cache.close()
    again = Cache(path)
    assert again.fact("/etc/x", "marked") == "yes"
    again.close()


def test_another_membership_begins_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "files.db")
    cache.begin("a/1")
    cache.note("/etc/x", "marked", "yes")
    cache.write("/etc/x", "held", [(b"a", Entry("d", 0o755, "root", "root"), None)])
    cache.begin("a/1")
    assert b"a" in cache.held("/etc/x")
    cache.begin("b/1")
    assert (cache.fact("/etc/x", "marked"), len(cache.held("/etc/x"))) == ("", 0)
    cache.close()


def test_a_tree_that_is_emptied_file_by_file_is_stopped_and_stays_so_when_it_is_opened_anew(
    new_tree: Callable[[Tree], LocalTree], tmp_path: Path
) -> None:
    tree = new_tree(CONFIG)
    root = tmp_path / "root"
    (root / "conf.d").mkdir()
    for name in ("conf.d/one", "conf.d/two", "main.cf"):
        (root / name).write_text(name)
    until_known(tree, lambda: tree.found.manifest.files == 3)
    settled(tree)
    shutil.rmtree(root / "conf.d")
    until_known(tree, lambda: tree.found.manifest.files == 1)
    (root / "main.cf").unlink()
    with pytest.raises(TreeStoppedError, match="all 3 files"):
        until_known(tree, lambda: False)
    again = new_tree(CONFIG)
    with pytest.raises(TreeStoppedError, match="all 3 files"):
        again.changes()
    again.accept()
    assert again.changes() == [(b"main.cf", None)]


def test_a_large_file_is_read_in_parts_and_others_are_told_meanwhile(
    new_tree: Callable[[Tree], LocalTree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "LARGE_BYTES", 1 << 20)
    monkeypatch.setattr(local_module, "SLICE_S", 0.0)
    tree = new_tree(SPOOL)
    root = tmp_path / "root/cluster/1"
    settled(tree)
    for name in ("a large", "gone", "written"):
        (root / name).write_bytes(os.urandom(20 << 20))
    until_known(tree, lambda: bool(tree.found.manifest.get(b"a large") or tree.due_s() == 0.0))
    (root / "small").write_text("small")
    order: list[bytes] = []

    def all_told() -> bool:
        order.extend(name for name, entry in tree.changes() if entry is not None)
        if order[-1:] == [b"small"]:
            (root / "gone").unlink(missing_ok=True)
            with (root / "written").open("ab") as file:
                file.write(b"more")
        return {b"a large", b"written"} <= set(order)

    eventually(all_told, within_s=30)
    assert order.index(b"small") < order.index(b"a large")
    for large in ("a large", "written"):
        entry = tree.found.manifest.get(large.encode())
        assert entry is not None
        assert entry.digest == blake2b((root / large).read_bytes(), digest_size=32).digest()
    eventually(lambda: tree.changes() == [] and tree.due_s() > 0)
    assert b"gone" not in tree.found.manifest


def test_of_many_new_files_some_are_told_while_the_others_are_read(
    new_tree: Callable[[Tree], LocalTree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "SLICE_S", 0.0)
    monkeypatch.setattr(local_module, "LEFT_AT_ONCE", 7)
    tree = new_tree(SPOOL)
    settled(tree)
    made = tmp_path / "made"
    for number in range(40):
        path = made / f"{number % 4}"
        path.mkdir(parents=True, exist_ok=True)
        (path / str(number)).write_text(f"mail {number}")
    time.sleep(0.1)
    made.rename(tree.root.path / "made")
    told: list[Change] = []
    looks = 0
    while changes := tree.changes():
        told += changes
        looks += 1
    assert looks > 10
    assert len(told) == len({name for name, _ in told}) == 45
    assert all(entry is not None for _, entry in told)
    # What goes meanwhile is not told as new, and nothing is told as gone that is there.
    (tree.root.path / "made").rename(tree.root.path / "again")
    tree.changes()
    shutil.rmtree(tree.root.path / "again/3")
    until_known(tree, lambda: tree.due_s() > 1)
    assert {os.fsdecode(name) for name, _ in tree.found.manifest.items()} == {
        str(path.relative_to(tree.root.path)) for path in tree.root.path.rglob("*") if ".pmgsync" not in path.parts
    }
