"""What processes cost: CPU seconds between two moments, and the most private memory seen meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import psutil

SAMPLE_S = 0.1

Processes = Mapping[int, str]
"""Process id -> what it is, for example "slave: apply"; several processes may be the same thing."""


class Meter:
    """Measures processes while `with` lasts; those that begin meanwhile are counted from their beginning.

    Args:
        find: gives the processes as they are now.
        sample: look again and again, for the memory and for processes that come and go.
    """

    def __init__(self, find: Callable[[], Processes], *, sample: bool = False) -> None:
        self._find = find
        self._sample = sample
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._memory: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._look(first=True)
        if self._sample:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._sample:
            self._thread.join()
        self._look()

    def _run(self) -> None:
        known: Processes = dict(self._names)
        refreshed = time.monotonic()
        while not self._stop.wait(SAMPLE_S):
            if time.monotonic() - refreshed > 2.0:
                known, refreshed = self._find(), time.monotonic()
            self._take(known, first=False)

    def _look(self, *, first: bool = False) -> None:
        self._take(self._find(), first=first)

    def _take(self, known: Processes, *, first: bool) -> None:
        for pid, name in known.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                times, memory = process.cpu_times(), process.memory_info()
                spent = times.user + times.system
                if pid not in self._first:
                    self._first[pid] = spent if first else 0.0
                self._last[pid] = spent
                self._names[pid] = name
                # Shared memory is the server's one buffer cache in every backend.
                self._memory[pid] = max(self._memory.get(pid, 0), memory.rss - memory.shared)

    @property
    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by name."""
        found: dict[str, float] = {}
        for pid, spent in self._last.items():
            found[self._names[pid]] = found.get(self._names[pid], 0.0) + spent - self._first[pid]
        return found

    @property
    def peak_mib(self) -> dict[str, float]:
        """The greatest private resident memory of one process of each name, MiB."""
        found: dict[str, float] = {}
        for pid, size in self._memory.items():
            found[self._names[pid]] = max(found.get(self._names[pid], 0.0), size / (1 << 20))
        return found


def server_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a PostgreSQL server so far, those of sessions that are over among them."""
    living = 0.0
    for one in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            living += sum(one.cpu_times()[:2])
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system + living)


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the processes under one: id and the last word of the command line that is no option's."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                yield child.pid, child.cmdline()[3]
