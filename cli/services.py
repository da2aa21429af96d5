"""The gateway's own services that read the database: stopped while it is replaced, and started again in any case."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cli.console import note

STOP_TIMEOUT_S = 120.0


@contextmanager
def stopped(names: Sequence[str]) -> Iterator[None]:
    """Stop those of the services that run here, and start them again at the end, also when the step failed.

    A machine without systemd, or without these services, is left as it is.
    """
    running = [name for name in names if _systemctl("is-active", "--quiet", name)]
    done = []
    try:
        for name in running:
            note(f"stopping {name}")
            done.append(name)
            if not _systemctl("stop", name):
                note(f"note: {name} could not be stopped")
        yield
    finally:
        for name in reversed(done):
            note(f"starting {name}")
            if not _systemctl("start", name):
                note(f"note: {name} could not be started; look at it: systemctl status {name}")


def _systemctl(*arguments: str) -> bool:
    if shutil.which("systemctl") is None:
        return False
    try:
        return not subprocess.run(
            ["systemctl", *arguments], check=False, capture_output=True, timeout=STOP_TIMEOUT_S
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
