"""The digest of a file's content, taken from a descriptor, and only when the file did not change meanwhile."""

from __future__ import annotations

import hashlib
import os

from pmgsync.core.manifests import DIGEST_BYTES
from pmgsync.files.directories import Root

READ_BYTES = 1 << 20


class ChangedMeanwhileError(Exception):
    """The file was written while it was read."""


def new_hash() -> hashlib.blake2b:
    """Return the hash that contents are named by."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return what differs after any write: device, inode, size, times of change of content and of inode."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_file(root: Root, name: bytes) -> tuple[bytes, os.stat_result]:
    """Return a regular file's digest and what it was when it was read.

    Raises:
        ChangedMeanwhileError: when it was written meanwhile.
        OSError: when it cannot be read.
    """
    fd = root.open_file(name)
    try:
        before = os.fstat(fd)
        digest = hash_descriptor(fd)
        if identity(os.fstat(fd)) != identity(before):
            raise ChangedMeanwhileError
    finally:
        os.close(fd)
    return digest, before


def hash_descriptor(fd: int, size: int = -1) -> bytes:
    """Return the digest of what follows in a file, of `size` bytes at most when that is not negative."""
    state = new_hash()
    while size and (data := os.read(fd, READ_BYTES if size < 0 else min(READ_BYTES, size))):
        state.update(data)
        size -= len(data) if size > 0 else 0
    return state.digest()
