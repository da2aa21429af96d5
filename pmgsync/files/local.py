"""A tree as this node's disk has it: scanned from what the cache remembers, then followed by its watch."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

from pmgsync.core.filenames import Selection
from pmgsync.core.manifests import Change
from pmgsync.core.trees import Tree, looks_vanished
from pmgsync.files.cache import Cache
from pmgsync.files.directories import FilesError, TreeStoppedError
from pmgsync.files.marker import ACCEPT_HINT, check_marker, open_root, write_marker
from pmgsync.files.scan import SETTLE_S, Found, Limits, Scanner
from pmgsync.files.watch import Watch

EMPTIED_S = 60.0
"""A tree that loses all its files within this time is taken for one whose disk is gone."""
SLICE_S = 0.1
"""When many files come at once, what was found of them is told after so long, while the rest is looked at."""
LEFT_AT_ONCE = 5000
"""More of what was left is not looked at again with it: names are sorted, and that takes a while, too."""
SCAN_S = 300.0
SCAN_SHARE = 1000
"""A scan comes after so many seconds, and after so many times its own duration: it catches what a watch has missed."""


class LocalTree:
    """One tree of this disk; used by one thread.

    Attributes:
        scans: how often the whole was looked at.
        problem: why changes are only found by scans, "" while they are watched.
    """

    def __init__(
        self,
        tree: Tree,
        path: Path,
        cache: Cache,
        limits: Limits,
        *,
        create: bool = True,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the tree's directory; `create`: make it when it is not there.

        Raises:
            TreeStoppedError: when its marker is gone, or all of it is.
            RootMissingError: when it is not there, and was never.
            FilesError: when it cannot be used.
        """
        self.tree = tree
        self.problem = ""
        self.scans = 0
        self._cache = cache
        self._limits = limits
        self._pulse = pulse
        self._selection = Selection(tree.rule.include, tree.rule.exclude)
        self.root = open_root(tree, path, cache, create=create)
        try:
            check_marker(self.root, cache, tree.name)
            self._watch = Watch(self.root)
        except (FilesError, TreeStoppedError):
            self.root.close()
            raise
        self._scanner = self._new_scanner(cache.seen(tree.name))
        self._scan_due = 0.0
        self._accepted = False

    def _new_scanner(self, found: Found) -> Scanner:
        return Scanner(self.root, self._selection, self._limits, found, entered=self._enter, pulse=self._pulse)

    @property
    def found(self) -> Found:
        """What the disk has."""
        return self._scanner.found

    def selects(self, name: bytes) -> bool:
        """True when the profile has a name synchronised."""
        return self._selection.selects(name)

    def fileno(self) -> int:
        """The descriptor that becomes readable when something is touched."""
        return self._watch.fileno()

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()
        self._scanner.close()
        self.root.close()

    def due_s(self) -> float:
        """Return in how many seconds `changes` has something to do even if nothing is touched."""
        due = 0.0 if self._scanner.left else max(0.0, self._scan_due - time.monotonic())
        if self.found.unsettled:
            due = min(due, SETTLE_S)
        created = self._watch.due_s()
        return due if created is None else min(due, created)

    def changes(self) -> list[Change]:
        """Return what has changed since the last time, or a part of it after a while; the cache knows it too.

        Raises:
            TreeStoppedError: when the tree looks as if its disk were gone; nothing of it is taken to be gone.
            FilesError: when it cannot be read.
        """
        touched = self._watch.take()
        if touched.lost or time.monotonic() >= self._scan_due:
            return self._scan()
        left = set(itertools.islice(self._scanner.left, LEFT_AT_ONCE))
        names = touched.names | self.found.unsettled | left
        deep = touched.deep | (self._scanner.left_deep & left)
        if not names and not deep:
            return []
        before = self.found.manifest.files
        found = self._scanner.look(names, deep, within_s=SLICE_S)
        return self._judged(found, before)

    def look(self, names: list[bytes]) -> list[Change]:
        """Look at names that this process itself has written."""
        found = self._scanner.look(names, settling=False)
        self._save()
        return found

    def accept(self) -> None:
        """Take the tree as it is now, on an administrator's word.

        Raises:
            FilesError: when its marker cannot be made.
        """
        write_marker(self.root, self._cache, self.tree.name)
        self._accepted = True
        self._scan_due = 0.0

    def scan_soon(self) -> None:
        """Have the next look be a scan of everything."""
        self._scan_due = 0.0

    def _scan(self) -> list[Change]:
        check_marker(self.root, self._cache, self.tree.name)
        before, started = self.found.manifest.files, time.monotonic()
        self.problem = ""
        self.scans += 1
        found = self._scanner.scan()
        took = time.monotonic() - started
        jitter = random.uniform(0.8, 1.2)  # noqa: S311 -- spreads scans, no secret
        self._scan_due = time.monotonic() + max(SCAN_S, SCAN_SHARE * took) * jitter
        return self._judged(found, before)

    def _judged(self, changes: list[Change], before: int) -> list[Change]:
        after, now = self.found.manifest.files, time.monotonic()
        # A look comes soon after the first file has gone: what is emptied at once for a person takes several looks.
        most, noted = self._cache.most.get(self.tree.name, (0, now))
        if max(before, after) >= most or (now - noted > EMPTIED_S and after):
            most, noted = max(before, after), now
        self._cache.most[self.tree.name] = most, noted
        if looks_vanished(most, after, config=self.tree.is_config) and not self._accepted:
            # The cache still has what was there: that is what is known until somebody says otherwise.
            self._scanner.close()
            self._scanner = self._new_scanner(self._cache.seen(self.tree.name))
            self._scan_due = 0.0
            raise TreeStoppedError(
                f"all {most} files of {self.root.path} are gone at once; no more of them is removed elsewhere",
                hint=ACCEPT_HINT.format(name=self.tree.name),
            )
        if changes:
            self._accepted = False
            if not after:
                del self._cache.most[self.tree.name]
        self._save()
        return changes

    def _save(self) -> None:
        manifest, stamps = self.found.manifest, self.found.stamps
        names = self._scanner.restamped()
        self._cache.write(self.tree.name, "seen", [(name, manifest.get(name), stamps.get(name)) for name in names])

    def _enter(self, directory: bytes) -> None:
        try:
            self._watch.add(directory)
        except FilesError as error:
            self.problem = str(error)
