"""An owner's tree and one that follows it, without brokers between them."""

from __future__ import annotations

import os
from pathlib import Path

from pmgsync.core.filenames import Selection
from pmgsync.core.manifests import Manifest
from pmgsync.core.profile import FileTree
from pmgsync.core.trees import Tree
from pmgsync.files.batches import Batch
from pmgsync.files.cache import Cache
from pmgsync.files.directories import Root
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

    def fill(self, count: int) -> None:
        """Have the owner hold so many small files, each newer than the one before."""
        (self.here / "spam").mkdir(parents=True)
        for number in range(count):
            (self.here / f"spam/{number}").write_text(f"mail {number}")
            os.utime(self.here / f"spam/{number}", (1000 + number, 1000 + number))

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
