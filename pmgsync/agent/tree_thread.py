"""The thread of one tree of files: what owned and followed trees have in common, and their status."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmgsync.core.backoff import Backoff
from pmgsync.core.trees import Tree
from pmgsync.errors import PmgsyncError
from pmgsync.files.cache import Cache
from pmgsync.files.directories import Root
from pmgsync.files.marker import write_marker
from pmgsync.files.scan import Limits
from pmgsync.wire.waiting import Wakeup

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0
SHOWN_FINDINGS = 3


@dataclass(slots=True)
class TreeStatus:
    """The status of one tree on this node; written by its thread, read by the worker."""

    files: int = 0
    size: int = 0
    behind: int = 0
    behind_since: float = 0.0
    findings: int = 0
    error: str = ""
    hint: str = ""
    recoverable: bool = True
    alerts: list[str] = field(default_factory=list)

    def note_behind(self, count: int) -> None:
        """Note how many names are not in place."""
        if not count:
            self.behind_since = 0.0
        elif not self.behind_since:
            self.behind_since = time.monotonic()
        self.behind = count

    def note_findings(self, findings: dict[bytes, str]) -> None:
        """Note what is left out of the tree."""
        self.findings = len(findings)
        shown = list(findings.values())[:SHOWN_FINDINGS]
        more = len(findings) - len(shown)
        self.alerts = [*shown, f"and {more} more"] if more else shown

    def to_map(self, tree: Tree) -> dict[str, Any]:
        """Return the report that the heartbeat carries (PROTOCOL.md, section 6)."""
        since = self.behind_since
        return {
            "tree": tree.name,
            "owner": tree.owner,
            "of_master": tree.of_master,
            "files": self.files,
            "bytes": self.size,
            "behind": self.behind,
            "behind_s": round(time.monotonic() - since, 1) if since else 0.0,
            "findings": self.findings,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tree is on this node, and what is kept about it."""

    tree: Tree
    path: Path
    cache: Cache
    limits: Limits


class TreeThread(ABC):
    """Looks after one tree until it is stopped; an error is shown and tried again."""

    def __init__(self, place: Place, changed: Callable[[], None]) -> None:
        """`changed` wakes the worker; it may be called from any thread."""
        self.place = place
        self.tree = place.tree
        self.status = TreeStatus()
        self.wakeup = Wakeup()
        self._changed = changed
        self._stopping = threading.Event()
        self._accepted = threading.Event()
        self._backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._thread = threading.Thread(target=self._run, name=f"tree {self.tree.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the tree is closed when this returns."""
        self._stopping.set()
        self.wakeup.wake()
        self._thread.join()
        self.wakeup.close()

    @property
    def stopping(self) -> bool:
        """True when the thread is to end."""
        return self._stopping.is_set()

    def accept(self) -> None:
        """Go on with the tree as it is, on an administrator's word.

        Raises:
            FilesError: when its marker cannot be made.
        """
        root = Root(self.place.path, self.tree.below)
        try:
            write_marker(root, self.place.cache, self.tree.name)
        finally:
            root.close()
        self._accepted.set()
        self.wakeup.wake()

    def take_acceptance(self) -> bool:
        """True once after `accept`."""
        if not self._accepted.is_set():
            return False
        self._accepted.clear()
        return True

    @abstractmethod
    def work(self) -> None:
        """Look after the tree; returns when the thread is to end."""

    def recovered(self) -> None:
        """Note that the tree is without errors."""
        self._backoff.succeeded()
        if self.status.error:
            log.info("action=tree-recovered tree=%s", self.tree.name)
            self.status.error = self.status.hint = ""
            self._changed()

    def trouble(self, error: PmgsyncError) -> None:
        """Show an error."""
        if self.status.error != error.message:
            level = logging.WARNING if error.recoverable else logging.ERROR
            log.log(level, "action=tree-error tree=%s error=%s", self.tree.name, error)
        self.status.error, self.status.hint = error.message, error.hint
        self.status.recoverable = error.recoverable
        self._changed()

    def _run(self) -> None:
        while not self.stopping:
            try:
                self.work()
            except PmgsyncError as error:
                self.trouble(error)
            except Exception as error:
                # An error in one tree must not stop the others.
                log.exception("action=tree-failed tree=%s", self.tree.name)
                self.trouble(PmgsyncError(f"{self.tree.name}: {type(error).__name__}: {error}"))
            if not self.stopping:
                self._pause(self._backoff.failed())

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.stopping and not self._accepted.is_set() and (left := deadline - time.monotonic()) > 0:
            self._stopping.wait(min(left, 0.2))
