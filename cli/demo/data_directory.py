"""The files of an embedded server: its database cluster, the settings in it, and its log."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pmgsync.errors import ConfigError, PmgsyncError
from pmgsync.postgres.programs import Account

_INCLUDED = "pmgsync.conf"
_STATUS_LINE = 7  # of postmaster.pid, from 0
_LOG_LINES = 20
_POLL_S = 0.01
_ORPHAN_S = 20.0

DEFAULT_SETTINGS = {
    "listen_addresses": "",
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_connections": "100",
    "shared_buffers": "64MB",
    # What a killed process has written is in the operating system's cache and is read from there after the kill. Only a
    # crash of the machine loses it, or tears pages, and no test does that. Commits still wait for their WAL to be
    # written, so that a kill cannot take back what a client was told is committed.
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "on",
    # Many servers share one disk: recycle WAL early.
    "min_wal_size": "32MB",
    "max_wal_size": "256MB",
    # Segments are files in the data directory, removed with it; in /dev/shm a kill would leave them for good.
    "dynamic_shared_memory_type": "mmap",
    "logging_collector": "off",
    "log_line_prefix": "%m [%p] ",
    "log_timezone": "UTC",
    "timezone": "UTC",
}


@dataclass(frozen=True)
class DataDirectory:
    """`data` and `server.log` in a directory; they belong to the account that the server runs as.

    Attributes:
        base: the directory.
        account: None for the account of this process.
    """

    base: Path
    account: Account | None

    @property
    def path(self) -> Path:
        """The database cluster."""
        return self.base / "data"

    @property
    def log(self) -> Path:
        """What initdb and the server say, over all starts."""
        return self.base / "server.log"

    @property
    def complete(self) -> bool:
        """Whether there is a database cluster to start from."""
        return (self.path / "PG_VERSION").exists()

    def initialize(self, run: Callable[[Sequence[object]], int | None], argv: Sequence[object], hint: str) -> None:
        """Make a database cluster, beside the final place, so that a data directory is either complete or not there.

        Always with initdb, about a second, and never by copying a prepared directory: replication tells servers apart
        by the system identifier, which a copy would share.

        Args:
            run: runs a program as the account and returns its exit status; None when it did not end in time, and then
                it has ended it.
            argv: initdb and further arguments, which win over the defaults (UTF8, locale C).
            hint: for when it fails.

        Raises:
            PmgsyncError: when initdb fails.
        """
        new = self.path.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if self.account:
            os.chown(new, self.account.uid, self.account.gid)
        initdb, *extra = argv
        defaults = ["-U", "postgres", "-A", "trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        status = run([initdb, "-D", new, *defaults, *extra])
        if status != 0:
            shutil.rmtree(new, ignore_errors=True)
            ended = "did not end in time" if status is None else f"ended with status {status}"
            raise PmgsyncError(f"initdb of {self.path} {ended}, {self.said(0)}", hint=hint)
        # The directory is another account's, who must not be able to direct root's writing by a symbolic link.
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(new / "postgresql.conf", flags), "w", encoding="utf-8") as file:
            file.write(f"\ninclude_if_exists '{_INCLUDED}'\n")
        new.rename(self.path)

    def write_settings(self, settings: Mapping[str, str]) -> None:
        """Replace the file of settings that postgresql.conf includes."""
        lines = [f"{name} = {quoted(value)}".replace("\n", "\\n") for name, value in settings.items()]
        text = "\n".join([*lines, ""])
        new = self.path / f"{_INCLUDED}.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            if self.account:
                os.fchown(file.fileno(), self.account.uid, self.account.gid)
            file.write(text)
        new.replace(self.path / _INCLUDED)

    def accepts_connections(self, pid: int) -> bool:
        """Return True when the postmaster with this process id says that it does."""
        try:
            lines = (self.path / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # The file of a killed server stays until the next has written its own.
        return len(lines) > _STATUS_LINE and lines[0] == str(pid) and lines[_STATUS_LINE].strip() == "ready"

    def await_orphan(self) -> None:
        """Wait for the postmaster whose guard was killed; the kernel has told it to shut down."""
        deadline = time.monotonic() + _ORPHAN_S
        while (self.path / "postmaster.pid").exists() and time.monotonic() < deadline:
            try:
                os.kill(int((self.path / "postmaster.pid").read_text().split("\n", 1)[0]), 0)
            except (OSError, ValueError):
                return
            time.sleep(_POLL_S)

    def remove(self) -> None:
        """Remove both. The directory is the caller's: other things in it stay, and it with them."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.base.rmdir()

    def log_size(self) -> int:
        """Return where the log ends now, to tell which lines belong to what comes next."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_tail(self, lines: int) -> str:
        """Return the last lines of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def said(self, offset: int) -> str:
        """Return the last lines of the log from there on, as the end of a sentence."""
        try:
            with self.log.open("rb") as file:
                file.seek(offset)
                lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        return "its log ends with:\n" + "\n".join(lines) if lines else "and its log is empty"


def checked_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings whose names are names.

    Raises:
        ConfigError: when one is not.
    """
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$.]*", name) or "\0" in value:
            raise ConfigError(f"{name!r} = {value!r} is not a setting of PostgreSQL")
    return dict(settings)


def quoted(value: str) -> str:
    """In single quotes, as libpq's connection strings and postgresql.conf both read it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
