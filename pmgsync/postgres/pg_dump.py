"""Which pg_dump this machine has for a server: a dump must not be made by an earlier version than the server's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pmgsync.errors import ConfigError, PmgsyncError
from pmgsync.postgres.programs import BINDIR_VARIABLE, find_binaries

INSTALLED = Path("/usr/lib/postgresql")


def find_pg_dump(server_major: int) -> Path:
    """Return a pg_dump for a server: of the same major version if there is one, else of the nearest later one.

    Raises:
        ConfigError: when there is none.
    """
    found = installed_pg_dumps()
    fitting = sorted(major for major in found if major >= server_major)
    if not fitting:
        seen = ", ".join(f"{path} is of version {major}" for major, path in sorted(found.items())) or "none was found"
        raise ConfigError(
            f"no pg_dump of PostgreSQL {server_major} or later is installed on this node ({seen})",
            hint=f"install postgresql-client-{server_major}, or name a directory of programs in {BINDIR_VARIABLE}",
        )
    return found[fitting[0]]


def installed_pg_dumps() -> dict[int, Path]:
    """Return this machine's pg_dump programs by major version."""
    found: dict[int, Path] = {}
    for directory in _directories():
        major = _major(directory / "pg_dump")
        if major is not None:
            found.setdefault(major, directory / "pg_dump")
    return found


def _directories() -> Iterator[Path]:
    named = os.environ.get(BINDIR_VARIABLE)
    if named:
        yield Path(named)
    pg_config = shutil.which("pg_config")
    if pg_config is not None:
        done = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
        if not done.returncode:
            yield Path(done.stdout.strip())
    yield from (path / "bin" for path in sorted(INSTALLED.glob("[0-9]*")))
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        yield Path(on_path).parent
    try:
        yield find_binaries()
    except PmgsyncError:
        return


def _major(program: Path) -> int | None:
    if not os.access(program, os.X_OK):
        return None
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    match = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    return int(match[1]) if match else None
