"""The starting process's end of an embedded server's guard (`embedded_guard`): gives it orders, and its end tells the
guard to clean up."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.programs import Account, temporary_directory, tool_environment

PROGRAM = Path(__file__).with_name("embedded_guard.py")
END_S = 20.0
"""A guard that is told to end may wait for its server first."""


class GuardGoneError(UnreachableError):
    """The guard has ended, and with it the server."""


class GuardClient:
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
                [sys.executable, "-I", "-S", PROGRAM, str(theirs.fileno()), str(os.getpid())],
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
            UnreachableError: the guard does not answer, or (GuardGoneError) is gone.
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
                    self._process.wait(END_S)
                raise GuardGoneError(
                    f"the process {self._process.pid} that guards an embedded PostgreSQL is gone"
                ) from error
            except OSError as error:
                raise UnreachableError(
                    f"the process {self._process.pid} that guards an embedded PostgreSQL does not answer ({error})"
                ) from error
        if "error" in reply:
            raise PmgsyncError(f"an embedded PostgreSQL's guard cannot {op}: {reply['error']}")
        return reply

    def spawn(self, argv: Sequence[object], log: Path) -> int:
        """Start a program as the account, with its output in `log`; returns its process id."""
        environment = {**tool_environment(), "HOME": str(self.scratch)}
        reply = self.ask("spawn", argv=[str(argument) for argument in argv], env=environment, log=str(log))
        return int(reply["pid"])

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return the exit status of a program that was started, None when it still runs after so many seconds."""
        status: int | None = self.ask("wait", timeout=seconds + 30, pid=pid, seconds=seconds)["status"]
        return status

    def run(self, argv: Sequence[object], log: Path, seconds: float) -> int | None:
        """Run a program to its end and return its exit status, None when it had to be ended after so many seconds."""
        status = self.wait(self.spawn(argv, log), seconds)
        if status is None:
            self.kill()
        return status

    def signal(self, pid: int, number: int) -> None:
        """Send a program a signal."""
        self.ask("signal", pid=pid, signal=number)

    def kill(self) -> None:
        """SIGKILL to everything that was started; returns when all is gone."""
        self.ask("kill")

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
        except GuardGoneError:
            return False
        finally:
            self._end()
        return True

    def _end(self) -> None:
        self._socket.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
