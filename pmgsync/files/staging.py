"""The staging area of a tree: contents named by their digest, verified before anything of them is seen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from pmgsync.core.manifests import DIGEST_BYTES, Entry
from pmgsync.files.attributes import describe
from pmgsync.files.directories import FilesError, Root, explain, own_directory
from pmgsync.files.hashing import READ_BYTES, hash_descriptor, new_hash

STAGE = b"stage"
_PART = b".part"
_NEW = b"new"
"""A content whose digest is not known yet."""
_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


Data = bytes | memoryview


class WrongContentError(FilesError):
    """What was received is not the content with that digest."""


class Staging:
    """The area of one tree, on the tree's own file system, so that a rename brings a file into place."""

    def __init__(self, root: Root, part: bytes = STAGE) -> None:
        """Open it and throw away what a crash left half written; a large file's first part is kept.

        Args:
            part: of pmgsync's own directory at the root; two that are used at the same time differ in it.

        Raises:
            FilesError: when it cannot be used.
        """
        self._root = root
        self._described: dict[bytes, Entry] = {}
        self._parts: set[bytes] = set()
        self.name = own_directory(root, part)
        try:
            with root.directory(self.name) as fd:
                self.fd = os.dup(fd)
            self.whole = self._recover()
        except OSError as error:
            raise explain(error, f"cannot use {root.show(self.name)}") from error

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _recover(self) -> set[bytes]:
        whole = set()
        for text in os.listdir(self.fd):
            name = os.fsencode(text)
            digest = _digest(name.removesuffix(_PART))
            if digest is None:
                self.drop(name)
            elif name.endswith(_PART):
                self._parts.add(digest)
            else:
                # A file may have its name without its content after a power cut.
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
                try:
                    right = hash_descriptor(file, os.fstat(file).st_size) == digest
                finally:
                    os.close(file)
                if right:
                    whole.add(digest)
                else:
                    self.drop(name)
        return whole

    def drop(self, name: bytes) -> None:
        """Remove one file of the area."""
        if name.endswith(_PART):
            self._parts.discard(_digest(name.removesuffix(_PART)) or b"")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def keep_only(self, digests: set[bytes]) -> None:
        """Throw away what nobody needs any more."""
        for text in os.listdir(self.fd):
            name = os.fsencode(text)
            if _digest(name.removesuffix(_PART)) not in digests:
                self.drop(name)
        self.whole &= digests
        self._described.clear()

    def put(self, digest: bytes, content: Data, entry: Entry | None = None) -> None:
        """Take a whole content; `entry`: the file becomes like it at once, which saves opening it again later.

        Raises:
            WrongContentError: when it is another one.
            OSError: when it cannot be written.
        """
        if new_hash(content).digest() != digest:
            raise WrongContentError("a file's content is not the one that was announced; it is fetched again")
        # Mostly it has its mode from the start then. Nobody else comes into the area.
        mode = 0o600 if entry is None else entry.mode & 0o777
        file = os.open(digest.hex(), _WRITE | os.O_TRUNC, mode, dir_fd=self.fd)
        try:
            _write(file, content)
            if entry is not None:
                try:
                    describe(file, entry)
                    self._described[digest] = entry
                except PermissionError:
                    pass  # it is told when the file is put in place, with its name
        finally:
            os.close(file)
        self.whole.add(digest)

    def take(self, pieces: Iterable[bytes], digest: bytes = b"") -> tuple[bytes, int]:
        """Take a whole content in pieces, and return its digest and its size.

        Args:
            digest: what it must be; b"" when that is not known.

        Raises:
            WrongContentError: when it is another one.
            OSError: when it cannot be written.
        """
        state, size = new_hash(), 0
        file = os.open(_NEW, _WRITE | os.O_TRUNC, 0o600, dir_fd=self.fd)
        try:
            for piece in pieces:
                state.update(piece)
                size += len(piece)
                _write(file, piece)
        finally:
            os.close(file)
        found = state.digest()
        if digest not in {b"", found}:
            self.drop(_NEW)
            raise WrongContentError("a file's content is not the one that belongs to its entry")
        os.rename(_NEW, found.hex(), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.whole.add(found)
        return found, size

    def part(self, digest: bytes) -> Part:
        """Begin a content that comes in pieces, or go on with one."""
        return Part(self, digest)

    def begin_part(self, digest: bytes) -> None:
        """Note that a content has begun to come in pieces."""
        self._parts.add(digest)

    def finish_part(self, digest: bytes) -> None:
        """Note that all pieces of a content have come."""
        self._parts.discard(digest)
        self.whole.add(digest)

    def begun(self, digest: bytes) -> int:
        """Return how many bytes are here of a content that came in pieces."""
        if digest not in self._parts:
            return 0
        try:
            return os.stat(digest.hex() + _PART.decode(), dir_fd=self.fd, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def copy(self, digest: bytes, root: Root, name: bytes) -> bool:
        """Take the content from a file that is here already; False when that has another content by now."""
        try:
            source = root.open_file(name)
        except OSError:
            return False
        target = digest.hex().encode()
        try:
            state = new_hash()
            file = os.open(target, _WRITE | os.O_TRUNC, 0o600, dir_fd=self.fd)
            try:
                while data := os.read(source, READ_BYTES):
                    state.update(data)
                    _write(file, data)
            finally:
                os.close(file)
        finally:
            os.close(source)
        if state.digest() != digest:
            self.drop(target)
            return False
        self.whole.add(digest)
        return True

    def ready(self, entry: Entry, *, last: bool) -> bytes:
        """Return the name of a file like the entry that may be renamed away; a copy unless it is the last one needed.

        Raises:
            OSError: when the copy cannot be written.
        """
        digest = entry.digest
        name = digest.hex().encode()
        if last and self._described.get(digest) == entry:
            self._forget(digest)
            return name
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if last:
                describe(source, entry)
                self._forget(digest)
                return name
            copy = b"copy-" + name
            target = os.open(copy, _WRITE | os.O_TRUNC, 0o600, dir_fd=self.fd)
            try:
                copy_content(source, target)
                describe(target, entry)
            finally:
                os.close(target)
        finally:
            os.close(source)
        return copy

    def _forget(self, digest: bytes) -> None:
        self.whole.discard(digest)
        self._described.pop(digest, None)


class Part:
    """A content that comes in pieces; what was written stays over a restart.

    Attributes:
        digest: of the whole.
        offset: bytes that are here already.
    """

    def __init__(self, staging: Staging, digest: bytes) -> None:
        self._staging = staging
        self.digest = digest
        self._name = digest.hex().encode() + _PART
        self._file = os.open(self._name, _WRITE, 0o600, dir_fd=staging.fd)
        staging.begin_part(digest)
        self._state = new_hash()
        self.offset = 0
        while data := os.read(self._file, READ_BYTES):
            self._state.update(data)
            self.offset += len(data)

    def write(self, offset: int, data: Data) -> None:
        """Take the next piece.

        Raises:
            WrongContentError: when it does not follow what is here.
            OSError: when it cannot be written.
        """
        if offset != self.offset:
            raise WrongContentError(f"a piece of a file begins at {offset}, {self.offset} bytes are here")
        # At its place: a disk that was full may have taken a part of the same bytes before.
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self._file, view, offset + len(data) - len(view)) :]
        self._state.update(data)
        self.offset += len(data)

    def finish(self) -> None:
        """Verify the whole; it is thrown away when it is wrong.

        Raises:
            WrongContentError: when it is not the content that was announced.
        """
        if self._state.digest() != self.digest or os.fstat(self._file).st_size != self.offset:
            self._staging.drop(self._name)
            raise WrongContentError("a file's content is not the one that was announced; it is fetched again")
        os.rename(self._name, self.digest.hex(), src_dir_fd=self._staging.fd, dst_dir_fd=self._staging.fd)
        self._staging.finish_part(self.digest)

    def close(self) -> None:
        """Close the file; what is in it stays."""
        os.close(self._file)


def copy_content(source: int, target: int) -> None:
    """Copy what follows in one open file to another, and bring it to the disk."""
    while data := os.read(source, READ_BYTES):
        _write(target, data)
    os.fsync(target)


def _write(file: int, data: Data) -> None:
    written = os.write(file, data)
    if written < len(data):
        view = memoryview(data)[written:]
        while view:
            view = view[os.write(file, view) :]


def _digest(name: bytes) -> bytes | None:
    """Return the digest that a file of the area is named by, None when it is no such name."""
    try:
        digest = bytes.fromhex(name.decode("ascii"))
    except ValueError:
        return None
    return digest if len(digest) == DIGEST_BYTES else None
