"""Files that rows name: looked for before the rows are applied, waited for, and told of when they do not come."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from pmgsync.config import NodeConfig
from pmgsync.core.filenames import show
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.named_files import NamedFile, Patience, is_expected
from pmgsync.core.profile import FileTree, Profile
from pmgsync.core.trees import Tree, trees_of
from pmgsync.errors import TransientApplyError
from pmgsync.files.directories import FilesError, Neighbour, Root

log = logging.getLogger(__name__)

FIRST_LOOK_S, LAST_LOOK_S = 0.002, 0.05
"""Between two looks for files that are waited for; they grow with the time that was waited."""
TOLD_S = 3600.0
"""So long a file that did not come is told of in status, unless it comes."""
MAX_TOLD = 1000
LOG_S = 1.0
"""A node that was away meets many at once: a line of the log a second."""
_NOT_HERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class AwaitedFiles:
    """The files that the rows of one origin name. `cancel` may be called from any thread, all else from one, but for
    `alerts`.
    """

    def __init__(
        self, config: NodeConfig, profile: Profile, origin: int, document: Callable[[], ClusterDocument]
    ) -> None:
        """`document` returns the cluster document of now."""
        self._config = config
        self._profile = profile
        self._origin = origin
        self._document = document
        self._trees: list[Tree] = []
        self._trees_of: ClusterDocument | None = None
        self._patience = Patience(config.row_wait_s)
        self._cancelled = threading.Event()
        self._late: dict[NamedFile, float] = {}
        self._logged_at, self._unlogged = -math.inf, 0

    def begin(self) -> None:
        """Begin a session: what was cancelled before is over."""
        self._cancelled.clear()

    def missing(self, named: Sequence[NamedFile], received: float) -> list[NamedFile]:
        """Return which files are to be waited for; those that rows go on without are noted."""
        trees = self._trees_now()
        gone = [file for file in self._not_here(named) if is_expected(file, trees, self._origin)]
        now = time.monotonic()
        if gone and self._patience.until(now, received) <= now:
            self._go_on_without(gone, now)
            return []
        return gone

    def wait(self, missing: Sequence[NamedFile], received: float) -> None:
        """Return when the files are here, or the row goes on without them.

        Raises:
            TransientApplyError: when it was cancelled.
        """
        started = time.monotonic()
        until = self._patience.until(started, received)
        left = list(missing)
        while left:
            now = time.monotonic()
            if now >= until:
                self._patience.failed(now)
                self._go_on_without(left, now)
                return
            pause_s = min(max(FIRST_LOOK_S, (now - started) / 10), LAST_LOOK_S, until - now)
            if self._cancelled.wait(pause_s):
                raise TransientApplyError("waiting for the file that a row names was given up")
            left = self._not_here(left)
        log.debug("action=file-came origin=%d waited_ms=%.0f", self._origin, (time.monotonic() - started) * 1000)

    def cancel(self) -> None:
        """End what is being waited for."""
        self._cancelled.set()

    def alerts(self) -> list[str]:
        """Return a sentence on the files that have not come yet, none when there are none."""
        told, now = self._late.copy(), time.monotonic()
        still = set(self._not_here(told))
        for file, since in told.items():
            if file not in still or now - since > TOLD_S:
                self._late.pop(file, None)
                still.discard(file)
        if not still:
            return []
        newest = show(max(still, key=told.__getitem__).path)
        if len(still) == 1:
            return [f"a row of node {self._origin} is shown without its file, {newest}"]
        return [f"{len(still)} rows of node {self._origin} are shown without their files; the newest is {newest}"]

    def _go_on_without(self, files: Sequence[NamedFile], now: float) -> None:
        for file in files:
            if len(self._late) >= MAX_TOLD:
                self._late.pop(next(iter(self._late)))
            self._late[file] = now
        self._unlogged += len(files)
        if now - self._logged_at > LOG_S:
            newest = show(files[-1].path)
            log.warning("action=rows-without-files origin=%d count=%d newest=%s", self._origin, self._unlogged, newest)
            self._logged_at, self._unlogged = now, 0

    def _trees_now(self) -> list[Tree]:
        document = self._document()
        if document is not self._trees_of:
            self._trees_of, self._trees = document, list(trees_of(self._profile, document).values())
        return self._trees

    def _not_here(self, files: Iterable[NamedFile]) -> list[NamedFile]:
        """Return which files are not here; what cannot be told is taken to be."""
        missing: list[NamedFile] = []
        by_rule: dict[FileTree, list[NamedFile]] = {}
        for file in files:
            by_rule.setdefault(file.rule, []).append(file)
        for rule, of_rule in by_rule.items():
            try:
                root = Root(self._config.root_of(rule), create=False)
            except FilesError:
                missing += of_rule
                continue
            neighbour = Neighbour(root)
            with contextlib.closing(root), contextlib.closing(neighbour):
                missing += [file for file in sorted(of_rule) if not _is_here(neighbour, file.path)]
        return missing


def _is_here(neighbour: Neighbour, path: bytes) -> bool:
    try:
        fd, last = neighbour.parent(path)
        return stat.S_ISREG(os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode)
    except OSError as error:
        return error.errno not in _NOT_HERE
    except ValueError:
        return True  # a NUL byte: no file is called so
