"""The process that owns an embedded server, so that the server never outlives whoever started it.

Run as a program by `cli.demo.embedded`, not imported by it. It is the parent of the server, and is told what to
do over a socket whose other end only the starting process holds: that process's end, however violent, is an end of
file here. The guard then stops the server and removes its directory. A `kill -9` of the guard itself is covered by the
kernel, which sends each server the signal asked for by PR_SET_PDEATHSIG.

Only the standard library is used: it starts in some 40 ms, and with any Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IPC_RMID = 0
_SHARED_MEMORY_LINE = 6  # of postmaster.pid, from 0: System V key and identifier
_IMMEDIATE_SECONDS = 5.0
_KILL_SECONDS = 10.0


class ParentGoneError(Exception):
    """Nobody is left who could give orders: clean up and end."""


def _die_with(guard: int) -> None:
    """Between fork and exec: have the kernel stop this process when the guard dies.

    SIGQUIT is PostgreSQL's immediate shutdown: as sudden as a crash, but the postmaster takes its children and its
    shared memory along. The setting is lost by a change of user, hence not before the privileges were dropped.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
    if os.getppid() != guard:
        os._exit(1)


def _descendants(ancestor: int) -> list[int]:
    """Process ids of children and their children, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only, and often
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_bytes()
                # The command's name is in parentheses and may contain anything; state and parent follow it.
                parent = int(stat.rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = list(children.get(ancestor, []))
    for pid in found:  # grows while it is walked: breadth first
        found.extend(children.get(pid, []))
    return found


class Guard:
    """Executes the orders of one starting process, one at a time.

    Args:
        control: the socket to the starting process; JSON lines, one reply to each order.
        parent: process id of the starting process.
    """

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._received = b""
        self._account: tuple[int, int] | None = None
        self._scratch = ""
        self._keep = True
        self._data = ""
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._terminated = False
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._wakeup = self._install_signals()
        self._poll.register(self._wakeup, select.POLLIN)
        self._watch_parent(parent)

    def _install_signals(self) -> socket.socket:
        def terminate(*_: object) -> None:
            self._terminated = True

        read_end, write_end = socket.socketpair()
        read_end.setblocking(False)
        write_end.setblocking(False)
        signal.set_wakeup_fd(write_end.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return read_end

    def _watch_parent(self, parent: int) -> None:
        """End of file alone does not do: a child forked by the parent without exec holds a copy of its socket."""
        self._parent_descriptor = -1
        with contextlib.suppress(OSError):  # a kernel or sandbox without pidfd_open: the socket must do
            self._parent_descriptor = os.pidfd_open(parent)
            self._poll.register(self._parent_descriptor, select.POLLIN)
        if os.getppid() != parent:  # it died before it could be watched
            self._terminated = True

    def serve(self) -> None:
        """Follow orders until told to close, or until nobody is left to give any."""
        try:
            while True:
                order = self._next_order()
                try:
                    reply = self._execute(order)
                except (OSError, subprocess.SubprocessError) as error:
                    reply = {"error": str(error)}
                try:
                    self._control.sendall(json.dumps({"number": order["number"], **reply}).encode() + b"\n")
                except OSError as error:
                    raise ParentGoneError from error
                if order["op"] == "close":
                    return
        except ParentGoneError:
            self._finish()

    def _next_order(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._pump(None)
        line, _, self._received = self._received.partition(b"\n")
        order: dict[str, Any] = json.loads(line)
        return order

    def _execute(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["op"]:
            case "open":
                return self._open(order)
            case "spawn":
                return {"pid": self._spawn(order["argv"], order["env"], order["log"])}
            case "wait":
                return {"status": self._wait(order["pid"], order["seconds"])}
            case "signal":
                self._reap()
                process = self._children[order["pid"]]
                if process.returncode is None:
                    os.kill(process.pid, order["signal"])
                return {}
            case "kill":
                self._kill_all()
                return {}
            case "close":
                self._keep = order["keep"]
                self._finish()
                return {}
        return {"error": f"order {order['op']!r} is unknown"}

    def _open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make (or take over) the scratch directory, here so that no moment exists in which nobody would remove it."""
        self._keep = order["keep"]
        self._account = (order["account"][0], order["account"][1]) if order["account"] else None
        if order["scratch"]:
            self._scratch = order["scratch"]
        else:
            self._scratch = tempfile.mkdtemp(prefix="pmgsync-", dir=order["parent_directory"])
            if self._account:
                os.chown(self._scratch, *self._account)
        self._data = order["data"] or str(Path(self._scratch, "data"))
        return {"scratch": self._scratch}

    def _spawn(self, argv: list[str], env: dict[str, str], log: str) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(log, flags, 0o600)
        try:
            guard = os.getpid()
            user, group = self._account or (None, None)
            process = subprocess.Popen(
                argv,
                env=env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                user=user,
                group=group,
                extra_groups=[] if self._account else None,
                preexec_fn=lambda: _die_with(guard),  # noqa: PLW1509 - this process has a single thread
            )
        finally:
            os.close(descriptor)
        self._children[process.pid] = process
        return process.pid

    def _wait(self, pid: int, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        self._reap()
        while self._children[pid].returncode is None and (left := deadline - time.monotonic()) > 0:
            self._pump(left)
        return self._children[pid].returncode

    def _pump(self, seconds: float | None) -> None:
        """Wait for a signal, an order or the parent's end, at most so long."""
        ready = {descriptor for descriptor, _ in self._poll.poll(None if seconds is None else seconds * 1000 + 1)}
        if self._wakeup.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wakeup.recv(4096)
        self._reap()
        if self._terminated or self._parent_descriptor in ready:
            raise ParentGoneError
        if self._control.fileno() in ready:
            try:
                received = self._control.recv(65536)
            except ConnectionError as error:
                raise ParentGoneError from error
            if not received:
                raise ParentGoneError
            self._received += received

    def _reap(self) -> None:
        """Collect everything that ended: own children, and orphans which came here (see PR_SET_CHILD_SUBREAPER)."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in self._children:
                    self._children[pid].returncode = os.waitstatus_to_exitcode(status)

    def _kill_all(self) -> None:
        """SIGKILL to everything below this process, until nothing is left."""
        own = os.getpid()
        deadline = time.monotonic() + _KILL_SECONDS
        while True:
            self._reap()
            remaining = _descendants(own)
            if not remaining:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {remaining} survive SIGKILL")
            for pid in remaining:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)

    def _finish(self) -> None:
        """Leave no process, no shared memory and, unless it is to be kept, no directory."""
        self._reap()
        running = [process.pid for process in self._children.values() if process.returncode is None]
        for pid in running:
            os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + _IMMEDIATE_SECONDS
        while any(self._children[pid].returncode is None for pid in running) and time.monotonic() < deadline:
            time.sleep(0.002)
            self._reap()
        try:
            self._kill_all()
            self._release_shared_memory()
        finally:
            if self._scratch and not self._keep:
                shutil.rmtree(self._scratch)

    def _release_shared_memory(self) -> None:
        """Remove the System V segment a killed postmaster could not; the kernel has room for 4096 of them only.

        With the rights of the account, which wrote the number: it shall not get foreign segments removed.
        """
        try:
            lines = Path(self._data, "postmaster.pid").read_text().splitlines()
            identifier = int(lines[_SHARED_MEMORY_LINE].split()[1])
        except (OSError, ValueError, IndexError):
            return
        pid = os.fork()
        if pid == 0:
            try:
                if self._account:
                    user, group = self._account
                    os.setgroups([])
                    os.setgid(group)
                    os.setuid(user)
                _LIBC.shmctl(identifier, _IPC_RMID, None)
            finally:
                os._exit(0)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def run() -> None:
    """Serve the process that is named on the command line: descriptor of the socket, process id."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    # Orphans of a killed postmaster become children of this process, which therefore can find and await them.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Guard(control, int(sys.argv[2])).serve()


if __name__ == "__main__":
    run()
