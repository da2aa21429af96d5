"""The machine's load, as a heartbeat tells it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine's state: seconds up, load average of a minute, memory and disk in per cent."""

    uptime_s: int
    load1: float
    mem_pct: float
    disk_pct: float


def measure_machine(path: Path) -> Machine:
    """Return the machine's load, and how full the file system of a path is."""
    return Machine(
        int(time.clock_gettime(time.CLOCK_BOOTTIME)),
        round(os.getloadavg()[0], 2),
        psutil.virtual_memory().percent,
        psutil.disk_usage(str(path)).percent,
    )
