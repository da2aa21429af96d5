"""The gateway's own services that read the database: stopped while it is replaced, and started again in any case.

What is stopped stands in a file meanwhile: a command that was killed leaves it, and the next one starts them again.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.console import note
from pmgsync.errors import ConfigError
from pmgsync.private_files import write_private

STOP_TIMEOUT_S = 120.0
FILE = "stopped-services"
"""In the state directory: a name a line."""


@contextmanager
def stopped(names: Sequence[str], state_dir: Path) -> Iterator[None]:
    """Stop those of the services that run here, and start them again at the end, also when the step failed.

    Those that a command before has stopped and, being killed, has not started count as running. A machine without
    systemd, or without these services, is left as it is.

    Raises:
        ConfigError: when it cannot be noted what is stopped; nothing was stopped then.
    """
    path = state_dir / FILE
    before = _noted(path)
    running = [name for name in names if name in before or _systemctl("is-active", "--quiet", name)]
    if running:
        write_private(path, "\n".join(running).encode())
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
        path.unlink(missing_ok=True)


def _noted(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): it says which services are to be started again") from error


def _systemctl(*arguments: str) -> bool:
    if shutil.which("systemctl") is None:
        return False
    try:
        return not subprocess.run(
            ["systemctl", *arguments], check=False, capture_output=True, timeout=STOP_TIMEOUT_S
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
