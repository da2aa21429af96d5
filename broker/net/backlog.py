"""What was sent to a peer and has not arrived there, in bytes.

Credit is the receiver's word, and libzmq's limit counts messages, which are of any size. What tells how much somebody
has really taken is TCP: the kernel counts the bytes that the other end has acknowledged.
"""

from __future__ import annotations

import errno
import os
import socket as tcp
import stat
import struct
from dataclasses import dataclass

MAX_BACKLOG = 64 << 20
"""Bytes that may wait for one connection. Those who read stay far below it, with credit of 4 MiB a stream or call."""
CHECK_BYTES = 1 << 20
"""The kernel is asked after so many bytes, not each time."""
PART_BYTES = 48
"""What CURVE and ZMTP add to each part of a message."""
_INFO_BYTES, _ACKNOWLEDGED = 136, 120
"""Of Linux's struct tcp_info: the beginning with tcpi_bytes_acked, and where that stands."""


@dataclass(slots=True, eq=False)
class Backlog:
    """Of one connection, which is found by its descriptor and proved by the place of the other end."""

    descriptor: int
    place: tuple[str, int]
    sent: int = 0
    unchecked: int = 0
    largest: int = 0

    def takes(self, parts: int, size: int) -> bool:
        """Count a message that is about to be sent; False when too much waits already, and it is not counted.

        A message that is larger than all that may wait goes alone, and those after it wait as long as without it.
        """
        if self.unchecked >= CHECK_BYTES:
            waiting = self.sent - acknowledged(self.descriptor, self.place)
            if waiting > MAX_BACKLOG + self.largest:
                return False
            self.unchecked = 0
            if waiting <= CHECK_BYTES:
                self.largest = 0
        total = size + parts * PART_BYTES
        self.sent += total
        self.unchecked += total
        self.largest = max(self.largest, total)
        return True


def acknowledged(descriptor: int, place: tuple[str, int]) -> int:
    """Return how many bytes the other end of a connection has acknowledged; all there can be when that is not known."""
    try:
        with duplicate(descriptor) as same:
            if same.getpeername()[:2] == place:
                found = same.getsockopt(tcp.IPPROTO_TCP, tcp.TCP_INFO, _INFO_BYTES)
                if len(found) >= _INFO_BYTES:
                    return int(struct.unpack_from("=Q", found, _ACKNOWLEDGED)[0])
    except OSError:
        pass
    return 1 << 62


def duplicate(descriptor: int) -> tcp.socket:
    """Return a connection under a descriptor of its own: libzmq may close its own at any instant, and the number may
    be another connection's then, or a file's.

    Raises:
        OSError: when there is no connection under that number any more.
    """
    # Looked at first, because closing a copy of a journal's descriptor would end the locks that SQLite has on it.
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
    copy = os.dup(descriptor)
    try:
        return tcp.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
