"""A tree that another node owns: whatever happens, it ends up as the owner has it, and nothing written here is lost."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from pmgsync.core.manifests import changes_between
from pmgsync.core.trees import Tree
from pmgsync.files import batches as batches_module
from tests.files.pair import CONFIG, SPOOL, Pair, manifest_of


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
    pair.fill(100)
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    assert set(batch.entries) == {b"spam", *(b"spam/%d" % number for number in range(9))}
    pair.fetch(batch)
    pair.intake.place(batch)
    (pair.here / "spam/new").write_text("new")
    pair.intake.offer(changes_between(pair.intake.owner, manifest_of(pair.source, pair.tree)))
    batch = pair.intake.batch()
    assert batch is not None
    assert b"spam/new" in batch.entries
    # The same when an announcement was missed.
    (pair.here / "spam/newer").write_text("newer")
    pair.compare()
    batch = pair.intake.batch()
    assert batch is not None
    assert b"spam/newer" in batch.entries


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
