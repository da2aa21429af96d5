"""The digest of a file's content, taken from a descriptor, and only when the file did not change meanwhile."""

from __future__ import annotations

import hashlib
import os
import time

from pmgsync.core.manifests import DIGEST_BYTES
from pmgsync.files.directories import open_regular

READ_BYTES = 1 << 20


class ChangedMeanwhileError(Exception):
    """The file was written while it was read."""


def new_hash(data: bytes | memoryview = b"") -> hashlib.blake2b:
    """Return the hash that contents are named by, over the first of them."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES)


def identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return what differs after any write: device, inode, size, times of change of content and of inode."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_file(directory: int, last: bytes) -> tuple[bytes, os.stat_result]:
    """Return the digest of a regular file in an open directory, and what it was when it was read.

    Raises:
        ChangedMeanwhileError: when it was written meanwhile.
        OSError: when it cannot be read.
    """
    fd, before = open_regular(directory, last)
    try:
        digest = hash_descriptor(fd, before.st_size)
        after = os.fstat(fd)
        # Device and inode of an open file stay as they are.
        if (
            after.st_ctime_ns != before.st_ctime_ns
            or after.st_mtime_ns != before.st_mtime_ns
            or after.st_size != before.st_size
        ):
            raise ChangedMeanwhileError
    finally:
        os.close(fd)
    return digest, before


class LongHash:
    """The digest of a large file, taken in parts: other files are looked at in between."""

    def __init__(self, directory: int, last: bytes) -> None:
        """Begin.

        Raises:
            OSError: when it cannot be read.
        """
        self._fd, self._before = open_regular(directory, last)
        self._state = new_hash()

    def is_of(self, status: os.stat_result) -> bool:
        """True when the file is still what it was at the beginning."""
        return identity(status) == identity(self._before)

    def go_on(self, until: float) -> bool:
        """Read on up to a moment of the monotonic clock; True at the end.

        Raises:
            OSError: when it cannot be read.
        """
        while data := os.read(self._fd, READ_BYTES):
            self._state.update(data)
            if time.monotonic() > until:
                return False
        return True

    def result(self) -> tuple[bytes, os.stat_result]:
        """Return what `hash_file` returns.

        Raises:
            ChangedMeanwhileError: when it was written meanwhile.
        """
        if not self.is_of(os.fstat(self._fd)):
            raise ChangedMeanwhileError
        return self._state.digest(), self._before

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def hash_descriptor(fd: int, expected: int = READ_BYTES) -> bytes:
    """Return the digest of what follows in a file; `expected`: how many bytes that probably are."""
    # No more room than is needed: getting and giving back a MiB takes as long as hashing a mail.
    size = min(READ_BYTES, expected + 1)
    data = os.read(fd, size)
    state = new_hash(data)
    while len(data) == size:  # less is the end of a regular file
        size = READ_BYTES
        data = os.read(fd, size)
        state.update(data)
    return state.digest()
