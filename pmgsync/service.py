"""What every service process does the same way: logging to stderr, a word to systemd, an end with its parent."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys

_PR_SET_PDEATHSIG = 1
_COLLECT_AFTER = 20_000, 20, 100
"""Containers made until the garbage collector looks at the new ones, and how often until it looks at older ones. With
700, 10, 10 it takes a quarter of the time of reading small transactions."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_KEPT_BYTES, _MAPPED_BYTES = 8 << 20, 4 << 20
"""So much that is freed stays with each arena, and what is larger than the second is given back at once."""
_SWITCH_S = 0.0005
"""Seconds after which a thread that computes lets another one have the interpreter. Python's own 5 ms are as long as a
change takes from its commit to the other node."""


def set_up_logging(*, verbose: bool = False) -> None:
    """Log to stderr, one record a line; the journal of systemd adds nothing that is missing here."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s",
    )


def favour_latency() -> None:
    """Keep the pauses short in which a process that has just been set up does nothing; to be called once.

    What is there now stays to the end: the garbage collector, which stops everything, need not look at it again. And it
    looks for cycles less often than usual: what a batch of changes is read into has none.
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def keep_freed_memory() -> None:
    """Have the C library keep a few MiB that were freed, for what is allocated next; to be called once, at the start.

    Pieces of files come by the MiB. Each would be given back to the kernel and asked for again, page by page: that was
    40 % of the CPU of a broker that passes files on.
    """
    # Other C libraries than glibc have no such call.
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def notify_systemd(state: str) -> None:
    """Send a state such as READY=1 to systemd (sd_notify); nothing happens when systemd did not start the process."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.connect("\0" + address[1:] if address.startswith("@") else address)
        notifier.sendall(state.encode())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens; exits when it is dead already.

    A worker that outlived its supervisor would be a second capture on one slot.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")
