"""A tree that another node owns: whatever happens, it ends up as the owner has it, and nothing written here is lost."""

# Longer than a module should be: one subject, and its tests share most of what they set up.
from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from pmgsync.core.filenames import Selection
from pmgsync.core.manifests import Entry, Manifest, changes_between
from pmgsync.core.profile import FileTree
from pmgsync.core.trees import Tree
from pmgsync.errors import ProtocolError
from pmgsync.files import batches as batches_module
from pmgsync.files import staging
from pmgsync.files.batches import Batch
from pmgsync.files.cache import Cache
from pmgsync.files.directories import FilesError, Root, TreeStoppedError
from pmgsync.files.hashing import new_hash
from pmgsync.files.intake import Intake
from pmgsync.files.reading import read_contents
from pmgsync.files.scan import Limits, Scanner
from tests.harness.cluster import eventually

SPOOL = Tree("/spool/cluster/1", FileTree("spool", "/spool", "", (), (), "cluster/{cid}"), "cluster/1", 1)
CONFIG = Tree("/etc/x", FileTree("config", "/etc/x", "", ("conf.d/", "main.cf", "t/"), ("own",)), "", 1)


def manifest_of(root: Path, tree: Tree) -> Manifest:
    """Return what a directory holds by a scan of its own."""
    opened = Root(root, tree.below)
    try:
        scanner = Scanner(opened, Selection(tree.rule.include, tree.rule.exclude), Limits())
        eventually(lambda: scanner.scan() is not None and not scanner.found.unsettled)
        return scanner.found.manifest
    finally:
        opened.close()


def digest_of(data: bytes) -> bytes:
    state = new_hash()
    state.update(data)
    return state.digest()


class Pair:
    """An owner's directory and a receiver, with nothing between them."""

    def __init__(self, tmp_path: Path, tree: Tree) -> None:
        self.tree = tree
        self.tmp_path = tmp_path
        self.source, self.target = tmp_path / "source", tmp_path / "target"
        self.here, self.there = self.source / tree.below, self.target / tree.below
        self.here.mkdir(parents=True)
        self.cache = Cache(tmp_path / "state/files.db")
        self.fetched = 0
        self.cid = 2
        self.intake = self._open()

    def _open(self) -> Intake:
        limits = Limits(max_count=10_000)
        return Intake(self.tree, self.target, self.cache, limits, self.cid, self.tmp_path / "state")

    def restart(self) -> None:
        """Be a process that was killed and started again."""
        self.intake.close()
        self.cache.close()
        self.cache = Cache(self.tmp_path / "state/files.db")
        self.intake = self._open()

    def compare(self) -> None:
        """Hear from the owner what it holds."""
        manifest = manifest_of(self.source, self.tree)
        groups = self.intake.owner.differing(manifest.sums())
        self.intake.compare(groups, dict(manifest.in_buckets(groups)))
        self.intake.compared()

    def fetch(self, batch: Batch, *, pieces: int = 1 << 30) -> None:
        """Stage what a batch needs; at most so many pieces."""
        wanted = self.intake.contents.missing(batch.needs)
        root = Root(self.source, self.tree.below)
        asked = [(number, need.name, offset) for number, (need, offset) in enumerate(wanted)]
        for parts, data in read_contents(root, asked):
            if pieces <= 0:
                return
            pieces -= 1
            at = 0
            for number, offset, size, last in parts:
                assert offset >= 0
                self.fetched += size
                self.intake.contents.stage(wanted[number][0], offset, data[at : at + size], last=last)
                at += size
        root.close()

    def sync(self) -> list[bytes]:
        """Bring the target in line; return the names that changed."""
        self.intake.postponed.clear()
        self.compare()
        if (local := self.intake.local) is not None:
            eventually(lambda: not (local.changes() or local.found.unsettled))
        changed = []
        while (batch := self.intake.batch()) is not None:
            self.fetch(batch)
            changed += self.intake.place(batch)
            assert not self.intake.errors, self.intake.errors
        return changed

    def assert_equal(self) -> None:
        assert dict(manifest_of(self.target, self.tree).items()) == dict(manifest_of(self.source, self.tree).items())


@pytest.fixture
def new_pair(tmp_path: Path) -> Iterator[Callable[[Tree], Pair]]:
    made: list[Pair] = []

    def make(tree: Tree) -> Pair:
        made.append(Pair(tmp_path, tree))
        return made[-1]

    yield make
    for pair in made:
        pair.intake.close()
        pair.cache.close()


def test_content_mode_time_and_deletions_are_kept_the_same(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "conf.d/empty").mkdir(parents=True)
    (pair.here / "conf.d").chmod(0o750)
    (pair.here / "main.cf").write_text("main")
    (pair.here / "main.cf").chmod(0o640)
    os.chown(pair.here / "main.cf", 33, 33)
    os.utime(pair.here / "main.cf", (1_000_000, 1_000_000))
    (pair.here / "conf.d/big").write_bytes(random.Random(1).randbytes(3 << 20))
    (pair.here / "conf.d/zero").touch()
    (pair.here / "conf.d/own").write_text("a certificate of the owner")
    (pair.there / "conf.d").mkdir(parents=True)
    (pair.there / "conf.d/own").write_text("a certificate of the receiver")
    assert set(pair.sync()) == {b"main.cf", b"conf.d/big", b"conf.d/zero"}
    pair.assert_equal()
    status = (pair.there / "main.cf").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_mtime) == (0o640, 33, 1_000_000)
    assert (pair.there / "conf.d/own").read_text() == "a certificate of the receiver"
    # A file becomes a directory and the other way, one moves, one goes.
    before = pair.fetched
    (pair.here / "main.cf").unlink()
    (pair.here / "main.cf").mkdir()
    (pair.here / "conf.d/empty").rmdir()
    (pair.here / "conf.d/empty").write_text("x")
    (pair.here / "conf.d/big").rename(pair.here / "conf.d/moved")
    (pair.here / "conf.d/zero").unlink()
    pair.sync()
    pair.assert_equal()
    assert pair.fetched - before == 1, "what only moved is not fetched"
    assert pair.sync() == []


def test_a_local_edit_is_put_back_and_kept_beside(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "conf.d").mkdir()
    (pair.here / "main.cf").write_text("right")
    (pair.here / "conf.d/a").write_text("a")
    pair.sync()
    (pair.there / "main.cf").write_text("edited")
    (pair.there / "conf.d/new").write_text("made here")
    (pair.there / "conf.d/a").unlink()
    pair.sync()
    pair.assert_equal()
    assert (pair.there / "main.cf").read_text() == "right"
    assert (pair.there / "conf.d/a").read_text() == "a"
    kept = {path.read_text() for path in pair.there.rglob("*.pmgsync-*")}
    assert kept == {"edited", "made here"}
    assert len(pair.intake.kept) == 2
    # The copies are nobody's business: they are neither removed nor taken for edits.
    assert pair.sync() == []


def test_what_a_newcomer_brings_is_kept_elsewhere(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "main.cf").write_text("the master's")
    (pair.there / "conf.d").mkdir(parents=True)
    (pair.there / "main.cf").write_text("the newcomer's")
    (pair.there / "conf.d/extra").write_text("extra")
    pair.sync()
    pair.assert_equal()
    kept = sorted(path.read_text() for path in (pair.tmp_path / "state/replaced").rglob("*") if path.is_file())
    assert kept == ["extra", "the newcomer's"]
    assert not list(pair.there.rglob("*.pmgsync-*"))


def test_what_a_master_wrote_goes_to_the_divergence_folder(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "conf.d").mkdir()
    for name in ("main.cf", "conf.d/a", "conf.d/b", "conf.d/same"):
        (pair.here / name).write_text(f"one {name}")
    pair.sync()
    # It becomes the master, changes all, and some of it back to what it once had from the other, which goes on too.
    pair.cache.note(CONFIG.name, "owner", "2")
    (pair.there / "main.cf").write_text("two")
    (pair.there / "conf.d/b").unlink()
    (pair.there / "conf.d/new").write_text("new")
    (pair.here / "main.cf").write_text("three")
    (pair.here / "conf.d/a").write_text("three a")
    pair.restart()
    pair.sync()
    pair.assert_equal()
    (kept,) = (pair.tmp_path / "state/divergence").iterdir()
    found = {str(path.relative_to(kept)): path.read_text() for path in kept.rglob("*") if path.is_file()}
    below = CONFIG.name.strip("/")
    assert found == {f"{below}/main.cf": "two", f"{below}/conf.d/new": "new", f"{below}/conf.d/a": "one conf.d/a"}
    # From now on it is like every other node.
    (pair.there / "main.cf").write_text("edited")
    pair.restart()
    pair.sync()
    assert [path.read_text() for path in pair.there.rglob("*.pmgsync-*")] == ["edited"]


def test_what_is_new_does_not_wait_for_all_that_was_there(
    new_pair: Callable[[Tree], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "BATCH_NAMES", 10)
    pair = new_pair(SPOOL)
    (pair.here / "spam").mkdir(parents=True)
    for number in range(100):
        (pair.here / f"spam/{number}").write_text(f"mail {number}")
        os.utime(pair.here / f"spam/{number}", (1000 + number, 1000 + number))
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    assert set(batch.names) == {b"spam", *(b"spam/%d" % number for number in range(9))}
    pair.fetch(batch)
    pair.intake.place(batch)
    (pair.here / "spam/new").write_text("new")
    pair.intake.offer(changes_between(pair.intake.owner, manifest_of(pair.source, pair.tree)))
    batch = pair.intake.batch()
    assert batch is not None
    assert b"spam/new" in batch.names
    # The same when an announcement was missed.
    (pair.here / "spam/newer").write_text("newer")
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    assert b"spam/newer" in batch.names


def test_nothing_goes_from_the_spool_of_a_node_that_is_gone(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(SPOOL)
    (pair.here / "spam").mkdir(parents=True)
    for number in range(200):
        (pair.here / f"spam/{number}").write_text(f"mail {number}")
    pair.sync()
    # The master answers for it now, and has not all of it; some of it goes there while this node watches.
    pair.tree = replace(pair.tree, gone=True)
    for number in range(150):
        (pair.here / f"spam/{number}").unlink()
    (pair.here / "spam/new").write_text("new")
    pair.restart()
    pair.sync()
    (pair.here / "spam/new").unlink()
    pair.sync()
    assert pair.intake.behind == 0
    assert len(list((pair.there / "spam").iterdir())) == 201
    for path in (pair.here / "spam").iterdir():
        path.unlink()
    pair.restart()
    pair.sync()
    assert len(list((pair.there / "spam").iterdir())) == 201


def test_a_local_purge_of_a_spool_stays_and_deletions_travel(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(SPOOL)
    (pair.here / "spam/01").mkdir(parents=True)
    for number in range(20):
        (pair.here / f"spam/01/{number}").write_text(f"mail {number}")
    (pair.here / "spam/01/0").chmod(0o4755)
    (pair.there / "virus").mkdir(parents=True)
    (pair.there / "virus/older").write_text("what was here before")
    (pair.there / "spam/01").mkdir(parents=True)
    (pair.there / "spam/01/3").write_text("mail 3")
    (pair.there / "spam/01/4").write_text("another mail 4")
    pair.sync()
    assert (pair.there / "spam/01/4").read_text() == "mail 4"
    assert [path.read_text() for path in pair.there.rglob("*.pmgsync-*")] == ["another mail 4"]
    assert (pair.there / "virus/older").read_text() == "what was here before"
    assert (pair.there / "spam/01/0").stat().st_mode & 0o7777 == 0o644
    (pair.there / "spam/01/7").unlink()
    (pair.here / "spam/01/8").unlink()
    (pair.here / "spam/01/new").write_text("new")
    pair.restart()
    pair.sync()
    names = {path.name for path in (pair.there / "spam/01").iterdir() if "pmgsync" not in path.name}
    assert names == {*map(str, range(20)), "new"} - {"7", "8"}


def test_a_hostile_owner_reaches_nothing_outside(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(SPOOL)
    outside = pair.tmp_path / "outside"
    outside.mkdir()
    (outside / "shadow").write_text("secret")
    pair.there.mkdir(parents=True, exist_ok=True)
    (pair.there / "link").symlink_to(outside)
    (pair.there / "file").symlink_to(outside / "shadow")
    os.link(outside / "shadow", pair.there / "hard")
    mode = (outside / "shadow").stat().st_mode
    evil, secret = b"evil", digest_of(b"secret")

    def file(content: bytes, digest: bytes | None = None) -> Entry:
        return Entry("f", 0o666, "root", "root", len(content), 1, digest or digest_of(content))

    pair.intake.offer(
        [
            (b"link/shadow", file(evil)),
            (b"file", file(evil)),
            (b"hard", file(b"secret", secret)),
        ]
    )
    pair.intake.compared()
    batch = pair.intake.batch()
    assert batch is not None
    for need, _ in pair.intake.contents.missing(batch.needs):
        pair.intake.contents.stage(need, 0, evil, last=True)
    pair.intake.place(batch)
    assert "symbolic link" in pair.intake.errors[b"link/shadow"].message
    assert (outside / "shadow").read_text() == "secret"
    assert (outside / "shadow").stat().st_mode == mode
    assert sorted(path.name for path in outside.iterdir()) == ["shadow"]
    assert not (pair.there / "file").is_symlink()
    assert (pair.there / "file").read_bytes() == evil
    with pytest.raises(ProtocolError):
        pair.intake.offer([(b"file/below", file(evil)), (b"file", file(evil))])


def test_a_content_that_is_another_is_refused(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(SPOOL)
    (pair.here / "mail").write_text("right")
    (pair.here / "long").write_bytes(b"x" * (3 << 20))
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    needs = {need.name: need for need in batch.needs}
    with pytest.raises(FilesError, match="not the one that was announced"):
        pair.intake.contents.stage(needs[b"mail"], 0, b"wrong", last=True)
    pair.intake.contents.stage(needs[b"long"], 0, b"y" * (1 << 20), last=False)
    with pytest.raises(FilesError, match="another size"):
        pair.intake.contents.stage(needs[b"long"], 1 << 20, b"y" * (3 << 20), last=False)
    pair.intake.contents.stage(needs[b"long"], 1 << 20, b"y" * (2 << 20), last=False)
    with pytest.raises(FilesError, match="not the one that was announced"):
        pair.intake.contents.stage(needs[b"long"], 3 << 20, b"", last=True)
    assert not (pair.there / "mail").exists()
    pair.sync()
    pair.assert_equal()


def test_a_large_file_goes_on_where_it_stopped(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(SPOOL)
    (pair.here / "large").write_bytes(random.Random(2).randbytes(8 << 20))
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    pair.fetch(batch, pieces=5)
    pair.restart()
    pair.sync()
    pair.assert_equal()
    assert pair.fetched == 8 << 20


def test_a_full_disk_stops_files_and_heals(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", target], check=True)
    pair = Pair(tmp_path, SPOOL)
    try:
        filler = target / "filler"
        filler.write_bytes(b"x" * (2 << 20))
        (pair.here / "a").write_bytes(random.Random(3).randbytes(1 << 20))
        (pair.here / "b").write_bytes(random.Random(4).randbytes(1 << 20))
        with pytest.raises(FilesError, match="no room"):
            pair.sync()
        # The disk fills while a batch is under way, too.
        filler.unlink()
        pair.compare()
        batch = pair.intake.batch()
        assert batch is not None
        filler.write_bytes(b"x" * (5 << 19))
        with pytest.raises(FilesError, match="No space"):
            pair.fetch(batch)
        assert not (pair.there / "b").exists()
        filler.unlink()
        pair.sync()
        pair.assert_equal()
    finally:
        pair.intake.close()
        pair.cache.close()
        subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("survived", range(12))
def test_a_pass_that_was_cut_off_is_finished_without_the_owner(
    new_pair: Callable[[Tree], Pair], monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Whenever a process is killed, the next one shows all of the old or all of the new, and fetches nothing."""
    pair = new_pair(CONFIG)
    (pair.here / "conf.d").mkdir()
    for number in range(5):
        (pair.here / f"conf.d/{number}").write_text(f"old {number}")
    (pair.here / "conf.d/gone").write_text("gone")
    pair.sync()
    old = listing(pair.there)
    for number in range(5):
        (pair.here / f"conf.d/{number}").write_text(f"new {number}")
    (pair.here / "conf.d/7").write_text("new 1")  # the same content twice
    (pair.here / "conf.d/sub").mkdir()
    (pair.here / "conf.d/sub/x").write_text("x")
    (pair.here / "conf.d/gone").unlink()
    (pair.there / "conf.d/3").write_text("edited here")

    class Killed(BaseException):
        pass

    left = [survived]

    def deadly(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **options: object) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            real(*args, **options)

        return call

    for name in ("rename", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    killed = False
    try:
        pair.sync()
    except Killed:
        killed = True
    monkeypatch.undo()
    before = pair.fetched
    pair.restart()
    seen = listing(pair.there)
    kept = {name: content for name, content in seen.items() if ".pmgsync-" in name}
    shown = {name: content for name, content in seen.items() if name not in kept}
    assert killed == (survived < 11)
    if shown != listing(pair.here):
        assert shown == old | {"conf.d/3": "edited here"}
        assert survived == 0, "only before the record is there nothing to finish"
    pair.sync()
    pair.assert_equal()
    assert pair.fetched - before <= (7 * 5 if survived == 0 else 0)
    assert set(kept.values()) <= {"edited here"}, "its own half pass is no edit of this node"
    assert "edited here" in [path.read_text() for path in pair.there.rglob("*.pmgsync-*")]


def test_a_record_that_cannot_be_read_is_dropped(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "main.cf").write_text("main")
    pair.sync()
    record = pair.there / ".pmgsync/pass"
    for data in (b"", b"\xc1", msgpack.packb([1, [["put", b"../x", None, False, None]]]), msgpack.packb([2, []])):
        record.write_bytes(data)
        pair.restart()
        assert not record.exists()
    assert not (pair.tmp_path / "x").exists()
    pair.sync()
    pair.assert_equal()


def listing(root: Path) -> dict[str, str]:
    """Return the contents of all files by name, but for pmgsync's own."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if not name.startswith(".pmgsync/")}


def test_what_one_file_refuses_does_not_stop_the_others(
    new_pair: Callable[[Tree], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = new_pair(SPOOL)
    for name in "abc":
        (pair.here / name).write_text(name)
    real = os.rename

    def rename(source: object, target: object, **descriptors: int) -> None:
        if target == b"b":
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target, **descriptors)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    pair.fetch(batch)
    assert sorted(pair.intake.place(batch)) == [b"a", b"c"]
    assert "user root may not" in pair.intake.errors[b"b"].message
    assert str(pair.there / "b") in pair.intake.errors[b"b"].message
    monkeypatch.setattr(os, "rename", real)
    pair.sync()
    pair.assert_equal()


def test_an_owner_that_lost_its_disk_empties_nobody(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "conf.d").mkdir()
    for number in range(3):
        (pair.here / f"conf.d/{number}").write_text("x")
    pair.sync()
    shutil.rmtree(pair.here / "conf.d")
    pair.compare()
    with pytest.raises(TreeStoppedError, match="has none of the 3 files"):
        pair.intake.batch()
    assert (pair.there / "conf.d/1").exists()
    pair.intake.accept()
    pair.sync()
    pair.assert_equal()


def test_a_torn_file_of_the_staging_area_is_thrown_away(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    area = staging.Staging(root)
    right = digest_of(b"right")
    area.put(right, b"right")
    area.close()
    directory = tmp_path / "root/.pmgsync/stage"
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / digest_of(b"torn").hex()).write_bytes(b"to")
    (directory / "copy-left").write_bytes(b"x")
    again = staging.Staging(root)
    assert again.whole == {right}
    assert [path.name for path in directory.iterdir()] == [right.hex()]
    again.close()
    root.close()


def test_a_pair_of_random_trees_ends_equal(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    rng = random.Random(5)
    names = ["conf.d/a", "conf.d/a/b", "conf.d/c", "main.cf", "t/x/y", "t/x"]
    for _ in range(25):
        side = rng.choice([pair.here, pair.here, pair.there])
        for _ in range(3):
            path = side / rng.choice(names)
            try:
                if path.is_dir() and rng.random() < 0.5:
                    shutil.rmtree(path)
                elif path.exists() and not path.is_dir():
                    path.unlink()
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(str(rng.random()))
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                continue
        (pair.here / "main.cf").write_text("never empty") if not (pair.here / "main.cf").is_dir() else None
        pair.intake.accept()
        pair.sync()
        for name, entry in changes_between(manifest_of(pair.target, CONFIG), manifest_of(pair.source, CONFIG)):
            # Only a directory may be left over: one with copies that were kept in it.
            left = pair.there / os.fsdecode(name)
            assert entry is None
            assert left.is_dir()
            assert list(left.rglob("*.pmgsync-*"))
