"""Directories by descriptor: every part of a name is opened by itself and no symbolic link is followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pmgsync.core.filenames import OWN_DIRECTORY, show
from pmgsync.errors import PmgsyncError
from pmgsync.files.owners import user_name

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY_MODE = 0o755
"""Of directories that nobody describes, such as `cluster` of a spool."""


class FilesError(PmgsyncError):
    """Something about a tree's files that could not be done; names the file and, of a permission, the user."""

    recoverable = True


class RootMissingError(FilesError):
    """The root of a tree does not exist on this node."""


class TreeStoppedError(PmgsyncError):
    """A tree looks as if its disk were gone; it waits for an administrator."""


def explain(error: OSError, what: str) -> FilesError:
    """Return the sentence for an error of the file system; `what` says what was tried on which file."""
    if error.errno in {errno.EACCES, errno.EPERM}:
        return FilesError(
            f"{what}: user {user_name(os.geteuid())} may not ({error.strerror})",
            hint="give that user the permission, or run the agent as root",
        )
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return FilesError(f"{what}: {error.strerror}", hint="make room; it goes on by itself")
    if error.errno == errno.EXDEV:
        return FilesError(
            f"{what}: it is on another file system than the tree's root", hint="mount the root itself there"
        )
    if error.errno in {errno.ELOOP, errno.ENOTDIR}:
        return FilesError(f"{what}: a symbolic link or a file stands where a directory must be")
    return FilesError(f"{what}: {error.strerror}")


class Root:
    """The directory of a tree, held open; everything below is reached from its descriptor.

    Attributes:
        path: for messages.
        fd: the descriptor.
    """

    def __init__(self, path: Path, below: str = "", *, create: bool = True) -> None:
        """Open a tree's directory.

        Args:
            path: chosen by this node's administrator, so it may lead over links.
            below: the part of a spool that is one node's, made when it is not there; no link is followed in it.
            create: make `path` when it is not there.

        Raises:
            RootMissingError: when it is not there, and is not to be made.
            FilesError: when it cannot be opened.
        """
        self.path = path / below
        try:
            if create and not path.exists():
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(DIRECTORY_MODE)
            elif not create and not path.is_dir():
                raise RootMissingError(f"there is no directory {path}")
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with self.directory(os.fsencode(below), create=True) as inner:
                outer, self.fd = self.fd, os.dup(inner)
                os.close(outer)
        except OSError as error:
            raise explain(error, f"cannot open the directory {self.path}") from error

    def moved(self) -> bool:
        """True when the path leads elsewhere by now: something was mounted, unmounted or renamed."""
        try:
            now, then = self.path.stat(), os.fstat(self.fd)
        except OSError:
            return True
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def show(self, name: bytes) -> str:
        """Return a name's whole path for messages."""
        return f"{self.path}/{show(name)}"

    @contextlib.contextmanager
    def directory(self, name: bytes, *, create: bool = False) -> Iterator[int]:
        """Open a directory below the root, b"" for the root itself; the descriptor is closed at the end.

        Raises:
            OSError: as the system tells it; ELOOP or ENOTDIR when some part is not a directory of its own.
        """
        fd = os.dup(self.fd)
        try:
            for part in name.split(b"/") if name else ():
                try:
                    inner = os.open(part, _FLAGS, dir_fd=fd)
                except FileNotFoundError:
                    if not create:
                        raise
                    made = False
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=fd)
                        made = True
                    inner = os.open(part, _FLAGS, dir_fd=fd)
                    if made:
                        # Whatever the umask is: a service with secrets has one that leaves others nothing.
                        os.fchmod(inner, DIRECTORY_MODE)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def parent(self, name: bytes, *, create: bool = False) -> Iterator[tuple[int, bytes]]:
        """Open the directory that a name lies in, and return it with the name's last part."""
        outer, _, last = name.rpartition(b"/")
        with self.directory(outer, create=create) as fd:
            yield fd, last

    def open_file(self, name: bytes) -> int:
        """Open a regular file for reading; no link at its end is followed, and opening a device or pipe does not hang.

        Raises:
            OSError: as the system tells it; ELOOP when it is not a regular file.
        """
        with self.parent(name) as (fd, last):
            return open_regular(fd, last)[0]

    def lstat(self, name: bytes) -> os.stat_result | None:
        """Return what a name is, None when there is nothing."""
        try:
            with self.parent(name) as (fd, last):
                return os.stat(last, dir_fd=fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None


class Neighbour:
    """The directory that was opened last: names that come in order mostly lie in the same one.

    To be used for one pass and closed then: a directory that is renamed meanwhile is still the one that was opened.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._name: bytes | None = None
        self._fd = -1

    def parent(self, name: bytes, *, create: bool = False) -> tuple[int, bytes]:
        """Return the open directory that a name lies in, good until the next call, and the name's last part.

        Raises:
            OSError: as `Root.directory`.
        """
        outer, _, last = name.rpartition(b"/")
        if outer != self._name:
            self.close()
            with self._root.directory(outer, create=create) as fd:
                self._fd = os.dup(fd)
            self._name = outer
        return self._fd, last

    def close(self) -> None:
        """Close the directory."""
        if self._name is not None:
            os.close(self._fd)
            self._name = None


def open_regular(fd: int, last: bytes) -> tuple[int, os.stat_result]:
    """Open a regular file in an open directory for reading; no link is followed, and a device or pipe does not hang.

    Returns:
        the descriptor, and what the file is.

    Raises:
        OSError: as the system tells it; ELOOP when it is not a regular file.
    """
    found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=fd)
    status = os.fstat(found)
    if not stat.S_ISREG(status.st_mode):
        os.close(found)
        raise OSError(errno.ELOOP, "it is not a regular file")
    return found, status


def own_directory(root: Root, part: bytes = b"") -> bytes:
    """Make pmgsync's own directory at a root, readable by nobody else, and return its name or that of a part of it."""
    for name in filter(None, (OWN_DIRECTORY, OWN_DIRECTORY + b"/" + part if part else b"")):
        try:
            with root.parent(name) as (fd, last), contextlib.suppress(FileExistsError):
                os.mkdir(last, 0o700, dir_fd=fd)
        except OSError as error:
            raise explain(error, f"cannot make the directory {root.show(name)}") from error
    return OWN_DIRECTORY + b"/" + part if part else OWN_DIRECTORY
