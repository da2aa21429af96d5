"""Batches of a spool: the contents of one are brought to the disk while the next is fetched."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable

import pytest

from pmgsync.core.manifests import changes_between
from pmgsync.core.trees import Tree
from pmgsync.files import batches as batches_module
from pmgsync.files import intake as intake_module
from pmgsync.files.batches import Batch
from pmgsync.files.directories import FilesError
from pmgsync.files.placing import FEW
from tests.files.pair import CONFIG, SPOOL, Pair, manifest_of

NAMES = 30


@pytest.fixture
def pair(new_pair: Callable[[Tree], Pair], monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A spool of 100 files, of which nothing was fetched."""
    monkeypatch.setattr(batches_module, "BATCH_NAMES", NAMES)
    pair = new_pair(SPOOL)
    pair.fill(100)
    pair.compare()
    return pair


def next_batch(pair: Pair) -> Batch:
    batch = pair.intake.batch()
    assert batch is not None
    pair.fetch(batch)
    return batch


def hear(pair: Pair) -> None:
    """Have the owner announce what it holds by now."""
    pair.intake.offer(changes_between(pair.intake.owner, manifest_of(pair.source, pair.tree)))


def test_the_next_batch_is_fetched_while_one_is_on_its_way_to_the_disk(pair: Pair) -> None:
    placed: list[bytes] = []
    while (batch := pair.intake.batch()) is not None:
        assert pair.intake.may_wait(batch) == (len(batch.needs) > FEW)
        before = pair.intake.under_way.batch
        if before is not None:
            assert not before.entries.keys() & batch.entries.keys()
            assert not any((pair.there / os.fsdecode(step.name)).is_file() for step in before.steps)
        pair.fetch(batch)
        placed += pair.intake.place_begun()
        if pair.intake.may_wait(batch):
            pair.intake.begin(batch)
        else:
            placed += pair.intake.place(batch)
    placed += pair.intake.place_begun()
    assert pair.intake.batch() is None
    assert sorted(placed) == sorted(b"spam/%d" % number for number in range(100))
    pair.assert_equal()
    assert pair.cache.held(SPOOL.name) == pair.intake.owner, "all of it is noted"


def test_what_is_changed_or_deleted_on_its_way_is_brought_in_line(pair: Pair) -> None:
    batch = next_batch(pair)
    pair.intake.begin(batch)
    changed, gone = [os.fsdecode(step.name) for step in batch.steps if step.what == "put"][:2]
    (pair.here / changed).write_text("another mail")
    (pair.here / gone).unlink()
    hear(pair)
    assert pair.intake.under_way.overtaken
    pair.intake.place_begun()
    assert (pair.there / gone).exists()
    assert (pair.there / changed).read_text().startswith("mail")
    assert pair.intake.held.get(os.fsencode(changed)) == batch.entries[os.fsencode(changed)]
    pair.sync()
    pair.assert_equal()


def test_a_directory_that_goes_waits_for_what_is_on_its_way_into_it(pair: Pair) -> None:
    pair.intake.begin(next_batch(pair))
    for path in (pair.here / "spam").iterdir():
        path.unlink()
    (pair.here / "spam").rmdir()
    (pair.here / "other").write_text("so that it is not empty")
    hear(pair)
    assert pair.intake.under_way.overtaken
    pair.intake.place_begun()
    pair.sync()
    pair.assert_equal()
    assert not (pair.there / "spam").exists()


def test_a_directory_goes_after_all_that_was_in_it(pair: Pair) -> None:
    (pair.here / "virus").mkdir()
    for number in range(50):
        (pair.here / f"virus/{number}").write_text(f"virus {number}")
    pair.sync()
    pair.assert_equal()
    shutil.rmtree(pair.here / "spam")
    shutil.rmtree(pair.here / "virus")
    (pair.here / "virus").write_text("a file by now")
    pair.sync()
    pair.assert_equal()
    assert sorted(path.name for path in pair.there.iterdir()) == [".pmgsync", "virus"]


def test_a_content_that_is_on_its_way_is_not_taken_for_the_next_batch_too(pair: Pair) -> None:
    pair.intake.begin(next_batch(pair))
    on_its_way = {need.digest for need in pair.intake.under_way.batch.needs} if pair.intake.under_way.batch else set()
    (pair.here / "twin").write_text("mail 0")  # the oldest comes first
    hear(pair)
    batch = next_batch(pair)
    assert b"twin" not in batch.entries
    assert on_its_way.isdisjoint(need.digest for need in batch.needs)
    pair.intake.place_begun()
    pair.intake.place(batch)
    before = pair.fetched
    batch = next_batch(pair)
    assert b"twin" in batch.entries
    assert pair.fetched - before == sum(need.entry.size for need in batch.needs) - len("mail 0"), "it is here already"
    pair.intake.place(batch)
    pair.sync()
    pair.assert_equal()


def test_what_the_disk_refuses_is_not_shown_and_fetched_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(intake_module, "sync_file_system", refuse)
        pair.intake.begin(next_batch(pair))
        next_batch(pair)
        with pytest.raises(FilesError, match="to the disk: Input/output error"):
            pair.intake.place_begun()
    assert not list(pair.there.rglob("spam/*"))
    assert not list((pair.there / ".pmgsync/stage").iterdir()), "it may be there without its bytes"
    assert pair.intake.place_begun() == []
    pair.sync()
    pair.assert_equal()


def test_what_was_on_its_way_when_the_process_ended_is_not_fetched_again(pair: Pair) -> None:
    batch = next_batch(pair)
    pair.intake.begin(batch)
    before = pair.fetched
    pair.restart()
    pair.sync()
    pair.assert_equal()
    whole = sum(len(f"mail {number}") for number in range(100))
    assert pair.fetched - before == whole - sum(need.entry.size for need in batch.needs)


def test_a_set_of_configuration_files_is_never_on_its_way_beside_another(new_pair: Callable[[Tree], Pair]) -> None:
    pair = new_pair(CONFIG)
    (pair.here / "conf.d").mkdir()
    for number in range(50):
        (pair.here / f"conf.d/{number}").write_text(str(number))
    pair.compare()
    assert not pair.intake.may_wait(next_batch(pair))
