"""A tree that this node answers for: watched, and every change handed to the worker, which announces it."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from pathlib import Path

from pmgsync.agent.tree_client import TreeClient
from pmgsync.agent.tree_thread import Place, TreeThread
from pmgsync.core.manifests import Change, Manifest
from pmgsync.errors import PmgsyncError
from pmgsync.files.directories import RootMissingError
from pmgsync.files.local import LocalTree
from pmgsync.files.passes import finish_pass
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

ROOT_S = 1.0
"""Seconds between two looks for a root that does not exist."""
SPOOL_QUIET_S = 0.01
CONFIG_QUIET_S = 0.15
"""Changes with shorter pauses between them belong together: a program writes several files one after the other."""
LONGEST_S = 2.0
"""After so long changes are announced even if more of them come."""

News = Manifest | list[Change]
"""The whole manifest, at the start, then changes of it."""


class OwnedTree(TreeThread):
    """Watches one tree.

    Attributes:
        news: what the worker has not taken yet.
        lsn: of this node's chain: what was committed before the newest change of a configuration is at or below it.
    """

    def __init__(self, place: Place, changed: Callable[[], None], *, broker: Path) -> None:
        """Begin; `broker` is the local socket."""
        super().__init__(place, changed)
        self.lsn = 0
        self._client = TreeClient(broker, stopping=lambda: self.stopping)
        self.news: queue.SimpleQueue[News] = queue.SimpleQueue()

    def work(self) -> None:
        """Watch until the thread is to end."""
        try:
            local = LocalTree(self.tree, self.place.path, self.place.cache, self.place.limits, create=False)
        except RootMissingError:
            # There is nothing to keep the same. (A root that was there once is an error, not this one.)
            self._tell(Manifest())
            self._backoff.succeeded()
            self.recovered()
            Waiter(wakeup=self.wakeup).wait(ROOT_S)
            self._backoff.succeeded()
            return
        try:
            if self.tree.is_config:
                # This node may have become the master in the middle of a pass of the one before.
                finish_pass(local.root, self.place.cache, self.tree.name)
            self._follow(local)
        finally:
            local.close()
            self._client.close()

    def _follow(self, local: LocalTree) -> None:
        if self.take_acceptance():
            local.accept()
        waiter = Waiter(local.fileno(), wakeup=self.wakeup)
        local.changes()
        while local.found.unsettled and not self.stopping:
            waiter.wait(local.due_s())
            local.changes()
        self._tell(local.found.manifest.copy())
        while not self.stopping:
            self._note(local)
            waiter.wait(local.due_s())
            if self.take_acceptance():
                local.accept()
            changes = self._together(local, waiter)
            if changes:
                if self.tree.is_config:
                    self._note_position()
                self._tell(changes)

    def _together(self, local: LocalTree, waiter: Waiter) -> list[Change]:
        """Return the changes that belong together, the newest of each name."""
        quiet_s = CONFIG_QUIET_S if self.tree.is_config else SPOOL_QUIET_S
        found = dict(local.changes())
        deadline = time.monotonic() + LONGEST_S
        # Each mail stands for itself: what is known of a spool is told at once.
        while (found and self.tree.is_config) or (local.found.unsettled and not found):
            if time.monotonic() >= deadline or self.stopping:
                break
            waiter.wait(quiet_s)
            more = local.changes()
            found.update(more)
            if not more and not local.found.unsettled:
                break
        return list(found.items())

    def _note_position(self) -> None:
        """Note where the own chain is: elsewhere, actions for these files wait until the rows so far are applied."""
        try:
            self.lsn = self._client.barrier()
        except PmgsyncError as error:
            # PostgreSQL is down: nothing is committed, and the files need not wait for it.
            log.info("action=no-position tree=%s error=%s", self.tree.name, error)

    def _note(self, local: LocalTree) -> None:
        manifest = local.found.manifest
        self.status.files, self.status.size = manifest.files, manifest.bytes
        self.status.note_findings(local.found.findings)
        if local.problem:
            self.trouble(PmgsyncError(local.problem))
        else:
            self.recovered()

    def _tell(self, news: News) -> None:
        self.news.put(news)
        self._changed()
