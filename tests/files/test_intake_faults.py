"""A tree that another node owns, when the owner lies, the disk is full or refuses, or a process is killed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from pmgsync.core.manifests import Entry
from pmgsync.core.trees import Tree
from pmgsync.errors import ProtocolError
from pmgsync.files import staging
from pmgsync.files.directories import FilesError, Root, TreeStoppedError
from tests.files.pair import CONFIG, SPOOL, Pair, digest_of


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


def test_a_restart_knows_the_parts_that_came_and_drops_what_is_none(tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    area = staging.Staging(root)
    whole = digest_of(b"abcdef")
    part = area.part(whole)
    part.write(0, b"abc")
    part.close()
    assert area.begun(whole) == 3
    area.close()
    (tmp_path / "root/.pmgsync/stage/no-digest.part").write_bytes(b"x")
    again = staging.Staging(root)
    assert again.begun(whole) == 3
    assert [path.name for path in (tmp_path / "root/.pmgsync/stage").iterdir()] == [f"{whole.hex()}.part"]
    part = again.part(whole)
    part.write(3, b"def")
    part.finish()
    part.close()
    assert again.begun(whole) == 0
    assert again.whole == {whole}
    part = again.part(digest_of(b"other"))
    part.close()
    again.keep_only({whole})
    assert again.begun(digest_of(b"other")) == 0
    again.close()
    root.close()
