"""A debug trace: when each hop of a change was, as lines in the directory that $PMGSYNC_TRACE names; else nothing.

One file a process, each line nanoseconds of the monotonic clock (the same for all processes of a machine), hop, LSN.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "PMGSYNC_TRACE"


def _make(directory: str | None) -> Callable[[str, int], None]:
    if not directory:
        return lambda name, lsn: None
    path = Path(directory) / f"{os.getpid()}.trace"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return lambda name, lsn: _write(file, f"{time.monotonic_ns()} {name} {lsn}\n".encode())


def _write(file: int, line: bytes) -> None:
    os.write(file, line)


hop = _make(os.environ.get(VARIABLE))
"""Note that a change has come to a hop: its name, and the commit LSN."""
