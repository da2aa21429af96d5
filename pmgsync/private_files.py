"""Files that survive a crash at any instant: replaced as a whole or not at all, and only this user can read them."""

from __future__ import annotations

import os
from pathlib import Path

from pmgsync.errors import ConfigError


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by new content that only this user can read, surviving a crash at any instant.

    Raises:
        ConfigError: when it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})", hint="make room there, or see that this user may write it"
        ) from error


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable: a new name is not on disk until its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
