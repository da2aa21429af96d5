"""The demo's handle on its cluster: asks for it, defines it with the commands that an administrator would use."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cli.console import Say
from cli.demo.hold import KEEP
from cli.demo.machine import SERVICES, DemoNode
from pmgsync.errors import PmgsyncError

END_S = 60.0
COMMAND_S = 300.0
LOG_LINES = 15


class DemoCluster:
    """A cluster of `count` nodes on this machine; `with` starts its servers and services, and removes them again."""

    def __init__(self, count: int, say: Say) -> None:
        self.count = count
        self.nodes: list[DemoNode] = []
        self.directory = Path()
        self._say = say
        self._holder: subprocess.Popen[bytes] | None = None
        self._kept = False

    def __enter__(self) -> Self:
        self._say(f"starting {self.count} PostgreSQL servers, brokers and agents")
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "cli.demo.hold", str(self.count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process; what it holds ends in order
        )
        try:
            answer = self._read()
            self.directory = Path(answer["directory"])
            self.nodes = [DemoNode(**node) for node in answer["nodes"]]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            self._end()

    def keep(self) -> int:
        """Leave everything running after this process; returns the id of the process that holds it."""
        assert self._holder is not None and self._holder.stdin is not None
        self._holder.stdin.write(KEEP)
        self._holder.stdin.flush()
        self._kept = True
        return self._holder.pid

    def _end(self) -> None:
        holder, self._holder = self._holder, None
        if holder is None:
            return
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.close()
        holder.terminate()
        try:
            holder.wait(END_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
        holder.stdout.close()

    def kill(self, node: DemoNode) -> None:
        """End a node's services and its server by SIGKILL, as a loss of power would.

        Raises:
            PmgsyncError: when that failed.
        """
        self._ask(f"kill {self.nodes.index(node)}")

    def start(self, node: DemoNode) -> None:
        """Start a node that was killed.

        Raises:
            PmgsyncError: when its server does not come up.
        """
        self._ask(f"start {self.nodes.index(node)}")

    def _ask(self, order: str) -> None:
        assert self._holder is not None and self._holder.stdin is not None
        self._holder.stdin.write(order.encode() + b"\n")
        self._holder.stdin.flush()
        self._read()

    def _read(self) -> dict[str, Any]:
        """Return what the holder answers.

        Raises:
            PmgsyncError: when something was wrong there.
        """
        assert self._holder is not None and self._holder.stdout is not None
        line = self._holder.stdout.readline()
        if not line:
            raise PmgsyncError("the demo's servers and services have ended, see above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PmgsyncError(answer["error"], hint=answer["hint"])
        return answer

    def define(self) -> None:
        """Create the cluster on the first node and have the others join it.

        Raises:
            PmgsyncError: when one of the commands fails.
        """
        master = self.nodes[0]
        self._say(f"pmgcm create on {master.name}")
        self.pmgcm(master, "create", "--name", "demo")
        for node in self.nodes[1:]:
            line = json.loads(self.pmgcm(master, "join-cmd", "--json"))["command"]
            self._say(f"pmgcm join on {node.name}")
            self.pmgcm(node, *shlex.split(line)[1:], "--yes")

    def pmgcm(self, node: DemoNode, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """Run `pmgcm` for a node and return what it prints.

        Raises:
            PmgsyncError: when it fails; says what it said.
        """
        done = self.try_pmgcm(node, *arguments, timeout_s=timeout_s)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise PmgsyncError(f"pmgcm {arguments[0]} on {node.name} ended with {done.returncode}:\n{said}")
        return done.stdout

    def try_pmgcm(
        self, node: DemoNode, *arguments: str, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `pmgcm` for a node and return how it ended."""
        try:
            return subprocess.run(
                [sys.executable, "-m", "cli.main", "--config", node.config, *arguments],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise PmgsyncError(f"pmgcm {arguments[0]} on {node.name} did not end within {timeout_s:.0f} s") from None

    def log_tails(self) -> Sequence[str]:
        """Return the last warnings and errors that the services logged, for when something went wrong."""
        found = []
        for node in self.nodes:
            for service in SERVICES:
                try:
                    lines = node.log(service).read_text(errors="replace").splitlines()
                except OSError:
                    continue
                told = [line for line in lines if " INFO " not in line][-LOG_LINES:]
                if told:
                    found += [f"--- {node.name} {service}", *told]
        return found
