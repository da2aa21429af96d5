"""The scan of a tree: metadata first, content only where the metadata differ from what was hashed before."""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from pmgsync.core.filenames import MAX_COMPONENT, MAX_DEPTH, MAX_NAME, Selection, parents
from pmgsync.core.manifests import Change, Entry, Manifest
from pmgsync.files.directories import FilesError, Neighbour, Root, explain
from pmgsync.files.hashing import ChangedMeanwhileError, LongHash, hash_file
from pmgsync.files.owners import group_name, user_name

_TICKING = 5
"""CLOCK_REALTIME_COARSE of Linux: the kernel stamps changes with this clock, which ticks every 1 to 10 ms. A file is
hashed when it has gone on since the file was changed. A second write in the same tick would leave inode, size and times
as they were when the first was hashed, and nobody would ever look again."""
SETTLE_S = time.clock_getres(_TICKING)
STEPPED_NS = 1_000_000_000
"""A stamp that is further ahead was made before the clock was set back: it is not waited for."""
LARGE_BYTES = 32 << 20
"""A larger file is read in parts, and other files are looked at in between."""
MAX_READING = 4
MAX_FINDINGS = 1000

Stamp = tuple[int, int]
"""Inode, and the time of its last change; with size and mtime it tells whether a file must be hashed again."""


@dataclass(slots=True)
class Limits:
    """What a tree may hold: the size of one file in bytes, and the number of files and directories."""

    max_size: int = 16 << 30
    max_count: int = 1_000_000


@dataclass(slots=True)
class Found:
    """What is known of a tree.

    Attributes:
        manifest: its entries.
        stamps: of each file, what it was when it was hashed.
        findings: by name, a sentence on what was left out and why.
        unsettled: names that were being written while they were looked at; to be looked at again.
        hashed: bytes hashed so far.
    """

    manifest: Manifest = field(default_factory=Manifest)
    stamps: dict[bytes, Stamp] = field(default_factory=dict)
    findings: dict[bytes, str] = field(default_factory=dict)
    unsettled: set[bytes] = field(default_factory=set)
    hashed: int = 0

    def set(self, name: bytes, entry: Entry | None, stamp: Stamp | None) -> bool:
        """Note what a name is; True when its entry is another than before."""
        if stamp is None:
            self.stamps.pop(name, None)
        else:
            self.stamps[name] = stamp
        return self.manifest.set(name, entry)


class Scanner:
    """Brings `found` in line with the file system, and tells what has changed.

    What cannot be read is not taken to be gone: its entries stay as they were, and a finding says why.
    """

    def __init__(
        self,
        root: Root,
        selection: Selection,
        limits: Limits,
        found: Found | None = None,
        *,
        entered: Callable[[bytes], None] = lambda directory: None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """`entered` is called with each directory before it is read, for a watch must miss nothing; `pulse` often."""
        self.root = root
        self.found = found or Found()
        self._selection = selection
        self._limits = limits
        self._entered = entered
        self._pulse = pulse
        self._changes: dict[bytes, Entry | None] = {}
        self._restamped: set[bytes] = set()
        self._settling = True
        self._until = math.inf
        self._begun = 0
        self._reading: dict[bytes, LongHash] = {}
        self.left: set[bytes] = set()
        self.left_deep: set[bytes] = set()
        # Of what is left: directories of which nothing was known, so that nothing known can be below them.
        self._fresh: set[bytes] = set()

    def scan(self, *, settling: bool = True) -> list[Change]:
        """Look at the whole tree; return the entries that changed.

        Args:
            settling: as for `look`.

        Raises:
            FilesError: when the root cannot be read, or holds more than it may.
        """
        seen: set[bytes] = set()
        unread: list[bytes] = []
        self.found.unsettled.clear()
        self._stop_reading()
        self.left, self.left_deep, self._fresh = set(), set(), set()
        self._settling, self._until = settling, math.inf
        self._entered(b"")
        try:
            with self.root.directory(b"") as fd:
                self._walk(fd, b"", seen, unread)
        except OSError as error:
            raise explain(error, f"cannot read {self.root.path}") from error
        self._forget((name for name in self.found.manifest if name not in seen), unread)
        for name in [name for name in self.found.findings if name not in seen]:
            del self.found.findings[name]
        return self._taken()

    def look(
        self,
        names: Iterable[bytes],
        deep: Iterable[bytes] = (),
        *,
        settling: bool = True,
        within_s: float = math.inf,
    ) -> list[Change]:
        """Look at some names again; return the entries that changed.

        Args:
            deep: directories whose content is looked at too.
            settling: False when it was this process that wrote them, and nobody else is likely to be at it.
            within_s: after so long what is left of the names, and of what is new in a directory, is put into `left` and
                `left_deep`; a large file is only read for so long, and then left, too.

        Raises:
            FilesError: when the tree holds more than it may.
        """
        whole, self._settling = set(deep), settling
        # Large files that are being read come last: they take all the time there is.
        chosen = sorted({*names, *whole}, key=lambda name: (name in self._reading, name))
        self._until, self._begun = time.monotonic() + within_s, self.found.hashed
        self.left.difference_update(chosen)
        self.left_deep -= whole
        neighbour = Neighbour(self.root)
        try:
            for at, name in enumerate(chosen):
                if at and time.monotonic() > self._until:
                    self.left.update(chosen[at:])
                    self.left_deep |= whole.intersection(chosen[at:])
                    break
                if any(map(self._selection.excludes, (name, *parents(name)))):
                    continue
                if not (self._selection.takes(name) or self._selection.enters(name)):
                    continue
                self._look(neighbour, name, deep=name in whole)
        finally:
            neighbour.close()
        self._stop_reading(self.left)
        self._settling = True
        return self._taken()

    def close(self) -> None:
        """Close what is being read."""
        self._stop_reading()

    def restamped(self) -> set[bytes]:
        """Return the names whose entry or stamp is another than when this was last asked."""
        names, self._restamped = self._restamped, set()
        return names

    # -- one name -----------------------------------------------------------------------------------------------------

    def _look(self, neighbour: Neighbour, name: bytes, *, deep: bool) -> None:
        self.found.unsettled.discard(name)
        known = self.found.manifest.get(name)
        # Only what was a directory has something below it: looking for that means looking at every name of the tree.
        was_directory = known.kind == "d" if known is not None else not self._selection.takes(name)
        inner = self.found.manifest.below(name) if was_directory and name not in self._fresh else []
        self._fresh.discard(name)
        try:
            fd, last = neighbour.parent(name)
            status = os.stat(last, dir_fd=fd, follow_symlinks=False)
            is_directory = self._visit(fd, last, name, status)
            if not is_directory:
                if stat.S_ISDIR(status.st_mode):
                    return
                self._forget(inner, ())
            elif deep:
                self._descend(fd, last, name, inner)
        except (FileNotFoundError, NotADirectoryError):
            self._forget([name, *inner], ())
            self.found.findings.pop(name, None)
        except OSError as error:
            self._finding(name, explain(error, f"cannot read {self.root.show(name)}").message)

    def _descend(self, fd: int, last: bytes, name: bytes, inner: Iterable[bytes]) -> None:
        """Look at a directory with all in it; `inner`: the names that were known below it."""
        seen: set[bytes] = {name}
        unread: list[bytes] = []
        self._enter(fd, last, name, seen, unread)
        self._forget((each for each in inner if each not in seen), unread)

    # -- directories --------------------------------------------------------------------------------------------------

    def _walk(self, fd: int, directory: bytes, seen: set[bytes], unread: list[bytes]) -> None:
        """Look at everything in an open directory."""
        self._pulse()
        prefix = directory + b"/" if directory else b""
        depth, selection = prefix.count(b"/"), self._selection
        with os.scandir(fd) as entries:
            for each in entries:
                last = os.fsencode(each.name)
                name = prefix + last
                if selection.excludes(name):
                    continue
                taken = selection.takes(name)
                if not taken and not selection.enters(name):
                    continue
                if len(name) > MAX_NAME or len(last) > MAX_COMPONENT or depth >= MAX_DEPTH:
                    self._finding(name, f"{self.root.show(name)} is left out: its name is too long")
                    continue
                try:
                    status = each.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                seen.add(name)
                is_fresh = taken and name not in self.found.manifest
                if not self._visit(fd, last, name, status):
                    continue
                if self._is_late():
                    if is_fresh:
                        self._fresh.add(name)
                    self.left.add(name)
                    self.left_deep.add(name)
                    unread.append(name)
                else:
                    self._enter(fd, last, name, seen, unread)

    def _enter(self, fd: int, last: bytes, name: bytes, seen: set[bytes], unread: list[bytes]) -> None:
        try:
            inner = os.open(last, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                unread.append(name)
                self._finding(name, explain(error, f"cannot read {self.root.show(name)}").message)
            return
        try:
            self._entered(name)
            self._walk(inner, name, seen, unread)
        finally:
            os.close(inner)

    # -- files --------------------------------------------------------------------------------------------------------

    def _visit(self, fd: int, last: bytes, name: bytes, status: os.stat_result) -> bool:
        """Note what one name in an open directory is; True when it is a directory to be entered."""
        if stat.S_ISDIR(status.st_mode):
            if self._selection.takes(name):
                self._set(name, _directory_entry(status), None)
                self.found.findings.pop(name, None)
            return self._selection.enters(name)
        if not self._selection.takes(name):
            return False
        if not stat.S_ISREG(status.st_mode):
            self._leave_out(name, f"{self.root.show(name)} is left out: it is {_kind(status.st_mode)}")
        elif status.st_size > self._limits.max_size:
            limit = self._limits.max_size
            self._leave_out(name, f"{self.root.show(name)} is left out: {status.st_size} bytes, {limit} are allowed")
        else:
            self._visit_file(fd, last, name, status)
        return False

    def _visit_file(self, fd: int, last: bytes, name: bytes, status: os.stat_result) -> None:
        known = self.found.manifest.get(name)
        if (
            known is not None
            and known.kind == "f"
            and self.found.stamps.get(name) == (status.st_ino, status.st_ctime_ns)
            and known.size == status.st_size
            and known.mtime_ns == max(0, status.st_mtime_ns)
        ):
            return
        if self._is_late():
            self.left.add(name)
            return
        if self._settling and 0 <= status.st_ctime_ns - time.clock_gettime_ns(_TICKING) < STEPPED_NS:
            self.found.unsettled.add(name)
            return
        try:
            hashed = self._hash(fd, last, name, status)
            if hashed is None:
                self.left.add(name)
                return
            digest, status = hashed
        except (ChangedMeanwhileError, FileNotFoundError):
            self.found.unsettled.add(name)
            return
        except OSError as error:
            self._finding(name, explain(error, f"cannot read {self.root.show(name)}").message)
            return
        self.found.hashed += status.st_size
        self.found.findings.pop(name, None)
        self._set(name, file_entry(status, digest), (status.st_ino, status.st_ctime_ns))
        self._pulse()

    def _hash(self, fd: int, last: bytes, name: bytes, status: os.stat_result) -> tuple[bytes, os.stat_result] | None:
        """Return what `hash_file` returns, None when a large file is left for later."""
        if status.st_size <= LARGE_BYTES or self._until == math.inf:
            return hash_file(fd, last)
        reading = self._reading.get(name)
        if reading is not None and not reading.is_of(status):
            self._reading.pop(name).close()
            reading = None
        if reading is None:
            if len(self._reading) >= MAX_READING:
                return None
            reading = self._reading[name] = LongHash(fd, last)
        return reading.result() if reading.go_on(self._until) else None

    def _is_late(self) -> bool:
        """True when what is new is to be left; something of it is hashed before, however short the time was."""
        return self.found.hashed > self._begun and time.monotonic() > self._until

    def _stop_reading(self, kept: Container[bytes] = ()) -> None:
        for name in [name for name in self._reading if name not in kept]:
            self._reading.pop(name).close()

    # -- results ------------------------------------------------------------------------------------------------------

    def _set(self, name: bytes, entry: Entry | None, stamp: Stamp | None) -> None:
        if entry is not None and name not in self.found.manifest and len(self.found.manifest) >= self._limits.max_count:
            raise FilesError(
                f"{self.root.path} holds more than {self._limits.max_count} files and directories",
                hint="raise max_files in the profile, or take some away",
            )
        if self.found.stamps.get(name) != stamp:
            self._restamped.add(name)
        if self.found.set(name, entry, stamp):
            self._changes[name] = entry
            self._restamped.add(name)

    def _leave_out(self, name: bytes, sentence: str) -> None:
        """Something is there that is not synchronised: for the others there is nothing."""
        self._finding(name, sentence)
        if name in self.found.manifest:
            self._set(name, None, None)

    def _finding(self, name: bytes, sentence: str) -> None:
        if name in self.found.findings or len(self.found.findings) < MAX_FINDINGS:
            self.found.findings[name] = sentence

    def _forget(self, names: Iterable[bytes], unread: Iterable[bytes]) -> None:
        """Note that names are gone, but for those below directories that could not be read."""
        kept = tuple(directory + b"/" for directory in unread)
        for name in [name for name in names if name in self.found.manifest and not (kept and name.startswith(kept))]:
            self._set(name, None, None)

    def _taken(self) -> list[Change]:
        changes, self._changes = list(self._changes.items()), {}
        return changes


def file_entry(status: os.stat_result, digest: bytes) -> Entry:
    """Return the entry of a file with this content."""
    mode, user, group = stat.S_IMODE(status.st_mode), user_name(status.st_uid), group_name(status.st_gid)
    return Entry("f", mode, user, group, status.st_size, max(0, status.st_mtime_ns), digest)


def _directory_entry(status: os.stat_result) -> Entry:
    return Entry("d", stat.S_IMODE(status.st_mode), user_name(status.st_uid), group_name(status.st_gid))


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((text for test, text in kinds if test(mode)), "no regular file")
