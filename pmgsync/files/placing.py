"""The rename pass: verified contents of the staging area take their places in the tree, as a plan says."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pmgsync.core.filenames import CONFLICT_MARK, MAX_COMPONENT
from pmgsync.core.manifests import Entry
from pmgsync.core.renames import Step
from pmgsync.files.attributes import describe
from pmgsync.files.directories import FilesError, Neighbour, Root, explain
from pmgsync.files.space import sync_file_system
from pmgsync.files.staging import Staging, copy_content
from pmgsync.private_files import sync_directory

FEW = 4
"""Up to so many files or directories are synced one by one, more by one call for the whole file system. That has
all else written, too, that a busy server has to write; but a commit of the journal for each of 16 took 23 ms, not 4."""


class Placer:
    """Executes plans in one tree, whose entries are what they become on this node (`attributes.localised`).

    Attributes:
        kept: paths of the copies that were kept since this was last emptied.
        errors: by name, why a step could not be done.
        remaining: directories that were to be removed and are not, for what is left in them is this node's own.
    """

    def __init__(self, root: Root, staging: Staging, keep_in: Path | None = None) -> None:
        """`keep_in`: a directory for contents that are to be kept; None: beside the file."""
        self._root = root
        self._staging = staging
        self._keep_in = keep_in
        self.kept: list[str] = []
        self.errors: dict[bytes, FilesError] = {}
        self.remaining: set[bytes] = set()
        self._touched: set[bytes] = set()

    def sync_contents(self, steps: Sequence[Step]) -> None:
        """Bring the contents that steps need to the disk: a name must never lead to a file whose bytes are not there.

        Raises:
            FilesError: when the disk refuses it.
        """
        needed = {step.entry.digest for step in steps if step.what == "put" and step.entry is not None}
        try:
            if len(needed) > FEW:
                sync_file_system(self._root.fd)
                self.synced()
                return
            for digest in needed:
                file = os.open(digest.hex(), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._staging.fd)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        except OSError as error:
            raise self.not_synced(error) from error

    def not_synced(self, error: OSError) -> FilesError:
        """Throw away what is staged, for the disk has refused it: a second try may succeed without the bytes there."""
        with contextlib.suppress(OSError):
            self._staging.keep_only(set())
        return explain(error, f"cannot bring what is staged for {self._root.path} to the disk")

    def synced(self) -> None:
        """Note that the whole file system was synced after the newest step."""
        self._touched.clear()

    def run(self, steps: Sequence[Step]) -> list[bytes]:
        """Do all the steps and return the names that are now as wanted; `sync` brings them to the disk."""
        self.errors.clear()
        needed = Counter(step.entry.digest for step in steps if step.what == "put" and step.entry is not None)
        done = []
        neighbour = Neighbour(self._root)
        try:
            for step in steps:
                try:
                    if step.what == "put" and step.entry is not None:
                        needed[step.entry.digest] -= 1
                        self._put(neighbour, step.name, step.entry, keep=step.keep, last=not needed[step.entry.digest])
                    else:
                        self._do(step)
                except OSError as error:
                    verb = "remove" if step.what == "remove" else "write"
                    self.errors[step.name] = explain(error, f"cannot {verb} {self._root.show(step.name)}")
                else:
                    done.append(step.name)
        finally:
            neighbour.close()
        return done

    def sync(self) -> None:
        """Bring all names to the disk.

        Raises:
            FilesError: when the disk refuses it.
        """
        try:
            if len(self._touched) > FEW:
                sync_file_system(self._root.fd)
            else:
                self._sync_directories()
        except OSError as error:
            raise explain(error, f"cannot bring {self._root.path} to the disk") from error
        self._touched.clear()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _do(self, step: Step) -> None:
        entry = step.entry
        if entry is None:
            self._remove(step.name, keep=step.keep)
        elif step.what == "directory" or entry.kind == "d":
            self._make_directory(step.name, entry)
        else:
            self._set(step.name, entry)

    def _put(self, neighbour: Neighbour, name: bytes, entry: Entry, *, keep: bool, last: bool) -> None:
        source = self._staging.ready(entry, last=last)
        fd, target = neighbour.parent(name, create=True)
        if keep:
            self._keep(fd, target, name)
        os.rename(source, target, src_dir_fd=self._staging.fd, dst_dir_fd=fd)
        self._touch(name)

    def _set(self, name: bytes, entry: Entry) -> None:
        with self._root.parent(name) as (fd, last):
            status = os.stat(last, dir_fd=fd, follow_symlinks=False)
            if status.st_nlink > 1:
                # The other names of the file may lie outside the tree, and are none of the owner's business.
                self._separate(fd, last, name)
        file = self._root.open_file(name)
        try:
            describe(file, entry)
            os.fsync(file)
        finally:
            os.close(file)

    def _separate(self, fd: int, last: bytes, name: bytes) -> None:
        copy = b"copy-set"
        source = self._root.open_file(name)
        try:
            target = os.open(
                copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=self._staging.fd
            )
            try:
                copy_content(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)
        os.rename(copy, last, src_dir_fd=self._staging.fd, dst_dir_fd=fd)
        self._touch(name)

    def _make_directory(self, name: bytes, entry: Entry) -> None:
        with self._root.parent(name, create=True) as (fd, last):
            with contextlib.suppress(FileExistsError):
                os.mkdir(last, 0o700, dir_fd=fd)
            directory = os.open(last, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            describe(directory, entry)
        finally:
            os.close(directory)
        self._touch(name)

    def _remove(self, name: bytes, *, keep: bool) -> None:
        try:
            with self._root.parent(name) as (fd, last):
                if stat.S_ISDIR(os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode):
                    self._remove_directory(fd, last, name, keep=keep)
                else:
                    if keep:
                        self._keep(fd, last, name)
                    os.unlink(last, dir_fd=fd)
        except FileNotFoundError:
            return
        self._touch(name)

    def _remove_directory(self, fd: int, last: bytes, name: bytes, *, keep: bool) -> None:
        try:
            os.rmdir(last, dir_fd=fd)
        except OSError as error:
            # What is left in it is this node's own (excluded names, copies that were kept).
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            if keep:
                for aside in _aside(last):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(aside, 0o700, dir_fd=fd)
                        os.rename(last, aside, src_dir_fd=fd, dst_dir_fd=fd)
                        self.kept.append(self._root.show(name[: len(name) - len(last)] + aside))
                        return
            else:
                self.remaining.add(name)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self, fd: int, last: bytes, name: bytes) -> None:
        """Keep what is there now; it stays under its name too."""
        try:
            status = os.stat(last, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            return
        if self._keep_in is not None:
            self._keep_elsewhere(name)
            return
        for kept in _aside(last):
            with contextlib.suppress(FileExistsError):
                os.link(last, kept, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
                self.kept.append(self._root.show(name[: len(name) - len(last)] + kept))
                return

    def _keep_elsewhere(self, name: bytes) -> None:
        assert self._keep_in is not None
        target = self._keep_in / os.fsdecode(name)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        source = self._root.open_file(name)
        try:
            copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            os.close(source)
            return  # it was kept before a crash
        try:
            copy_content(source, copy)
            os.fsync(copy)
        finally:
            os.close(source)
            os.close(copy)
        sync_directory(target.parent)
        self.kept.append(os.fsencode(target).decode(errors="backslashreplace"))

    # -- the disk -----------------------------------------------------------------------------------------------------

    def _touch(self, name: bytes) -> None:
        self._touched.add(name.rpartition(b"/")[0])

    def _sync_directories(self) -> None:
        for directory in self._touched:
            # A directory that was touched may have made room for a file since.
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                self._root.directory(directory) as fd,
            ):
                os.fsync(fd)


def _aside(last: bytes) -> Iterator[bytes]:
    """Yield dated names for what is kept beside; the first that is free is taken."""
    mark = CONFLICT_MARK + time.strftime("%Y%m%dT%H%M%S", time.localtime()).encode()
    for number in itertools.count():
        end = mark + (b"-%d" % number if number else b"")
        yield last[: MAX_COMPONENT - len(end)] + end
