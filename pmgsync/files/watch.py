"""The watch of a tree: inotify tells which names were touched; when it cannot, a scan is asked for.

Watches are added through descriptors (`/proc/self/fd/N`), by inotify_simple: it hands on watch numbers and masks as
they are, tells of overflow and unmount, and names survive that are not UTF-8. asyncinotify is better maintained, but it
wants paths and keeps an object for each watch; watchfiles swallows overflow.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field

from inotify_simple import INotify, flags

from pmgsync.core.filenames import CONFLICT_MARK, OWN_DIRECTORY
from pmgsync.files.directories import FilesError, Root, explain

# Reads are never watched. CREATE alone tells of a hard link; a file that is written is looked at when it is closed.
_MASK = (
    flags.CLOSE_WRITE
    | flags.MOVED_TO
    | flags.MOVED_FROM
    | flags.CREATE
    | flags.DELETE
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
    | flags.EXCL_UNLINK
)
CREATED_S = 0.5
"""A file that was only created is looked at after this, unless it is closed before: whoever made it is writing it."""


@dataclass(slots=True)
class Touched:
    """What happened since the last time.

    Attributes:
        names: to be looked at now.
        deep: directories that are new here: to be looked at with all in them.
        lost: events were lost, or the root itself is not what it was: everything must be scanned.
    """

    names: set[bytes] = field(default_factory=set)
    deep: set[bytes] = field(default_factory=set)
    lost: bool = False

    def __bool__(self) -> bool:
        return bool(self.names or self.deep or self.lost)


class Watch:
    """Watches the directories it is given.

    A watch is added through the descriptor of the directory that was opened part by part, so that no symbolic link
    can put another one in its place between two looks.
    """

    def __init__(self, root: Root) -> None:
        """Begin to watch nothing.

        Raises:
            FilesError: when the system has no inotify instance left.
        """
        self._root = root
        try:
            self._inotify = INotify(nonblocking=True)
        except OSError as error:
            raise explain(error, "cannot watch for changes (fs.inotify.max_user_instances)") from error
        self._directories: dict[int, bytes] = {}
        self._watches: dict[bytes, int] = {}
        self._created: dict[bytes, float] = {}

    def fileno(self) -> int:
        """The descriptor that becomes readable when something happens."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """Watch nothing any more."""
        self._inotify.close()

    def add(self, directory: bytes) -> None:
        """Watch a directory, b"" for the root; one that is gone is none to watch.

        Raises:
            FilesError: when the system's limit of watches is reached.
        """
        try:
            with self._root.directory(directory) as fd:
                number = self._inotify.add_watch(f"/proc/self/fd/{fd}", _MASK)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise FilesError(
                    f"no more directories can be watched for changes ({self._root.show(directory)})",
                    hint="raise fs.inotify.max_user_watches; until then changes are found by the periodic scan",
                ) from error
            return
        old = self._watches.get(directory)
        if old is not None and old != number:
            self._directories.pop(old, None)
        previous = self._directories.get(number)
        if previous is not None and previous != directory:
            self._watches.pop(previous, None)
        self._directories[number] = directory
        self._watches[directory] = number

    @property
    def watched(self) -> int:
        """How many directories are watched."""
        return len(self._watches)

    def due_s(self) -> float | None:
        """Return in how many seconds a name that was only created is to be looked at, None when there is none."""
        return max(0.0, min(self._created.values()) - time.monotonic()) if self._created else None

    def take(self) -> Touched:
        """Return what happened, without waiting."""
        found = Touched()
        for number, mask, _, name in self._inotify.read(timeout=0):
            if mask & flags.Q_OVERFLOW:
                found.lost = True
                continue
            directory = self._directories.get(number)
            if directory is None:
                continue
            if mask & (flags.UNMOUNT | flags.IGNORED | flags.DELETE_SELF | flags.MOVE_SELF):
                self._ended(number, directory, mask, found)
            else:
                self._touched(directory, os.fsencode(name), mask, found)
        now = time.monotonic()
        for each in [name for name, due in self._created.items() if due <= now]:
            del self._created[each]
            found.names.add(each)
        return found

    def _ended(self, number: int, directory: bytes, mask: int, found: Touched) -> None:
        if directory == b"" or mask & flags.UNMOUNT:
            found.lost = True
        elif mask & flags.MOVE_SELF:
            # Where it went is told by its new parent, if that is watched; its own watch would go on under the old name.
            self._drop(directory)
        if mask & flags.IGNORED:
            self._directories.pop(number, None)
            if self._watches.get(directory) == number:
                del self._watches[directory]
        if directory:
            found.names.add(directory)

    def _touched(self, directory: bytes, last: bytes, mask: int, found: Touched) -> None:
        if not last:
            # Mode or owner of the directory itself.
            if directory:
                found.names.add(directory)
            return
        if last == OWN_DIRECTORY or CONFLICT_MARK in last:
            return
        name = directory + b"/" + last if directory else last
        if mask & flags.ISDIR:
            if mask & (flags.CREATE | flags.MOVED_TO):
                found.deep.add(name)
            elif mask & flags.MOVED_FROM:
                self._drop(name)
            found.names.add(name)
        elif mask & ~flags.CREATE & _MASK:
            self._created.pop(name, None)
            found.names.add(name)
        else:
            self._created.setdefault(name, time.monotonic() + CREATED_S)

    def _drop(self, directory: bytes) -> None:
        """Stop watching a directory and what is below it."""
        prefix = directory + b"/"
        for each in [each for each in self._watches if each == directory or each.startswith(prefix)]:
            number = self._watches.pop(each)
            self._directories.pop(number, None)
            try:
                self._inotify.rm_watch(number)
            except OSError:
                continue  # it has ended by itself
