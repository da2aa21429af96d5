"""Free space and durability of one file system.

Contents are synced by one `syncfs` a batch: an fsync for each of 20 000 spool files would take minutes on a disk. A
batch is noted in the cache only after its contents, and then its names, are on disk.
"""

from __future__ import annotations

import ctypes
import os

from pmgsync.files.directories import FilesError, Root

RESERVE_BYTES = 64 << 20
RESERVE_SHARE = 50
"""So much stays free, or one part in so many of the file system when that is less: rows must find room too."""

_libc = ctypes.CDLL(None, use_errno=True)


def check_room(root: Root, needed: int) -> None:
    """Check that a file system has room for more bytes.

    Raises:
        FilesError: when it has not; it heals when there is room.
    """
    status = os.fstatvfs(root.fd)
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    reserve = min(RESERVE_BYTES, size // RESERVE_SHARE)
    if free - needed < reserve or (status.f_files and status.f_favail < 16):
        raise FilesError(
            f"no room for {needed} bytes more below {root.path}: {free} are free, {reserve} of them are kept",
            hint="make room; it goes on by itself",
        )


def sync_file_system(fd: int) -> None:
    """Write everything of a file system to its disk: one call for a whole batch of files.

    Raises:
        OSError: when that failed, for whatever file; nothing of the batch counts then.
    """
    if _libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
