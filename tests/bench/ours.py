"""pmgsync as an administrator runs it: the two services on every node, `pmgcm create`, `pmgcm join`."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pmgsync.core.positions import parse_lsn
from pmgsync.errors import PmgsyncError
from pmgsync.service import die_with_parent
from pmgsync.wire.link import BrokerLink
from tests.bench.processes import Processes, children
from tests.bench.servers import Servers, ask, await_mark

SERVICES = {"broker": "broker.main", "agent": "pmgsync.agent.supervisor"}
ADDRESS = "127.0.0.1"
STOP_S, COMMAND_S, CAPTURED_S = 20.0, 600.0, 300.0
PORTS = range(30_000, 32_768)
"""Below the range that outgoing connections take theirs from."""
_BACKENDS = """
SELECT pid, CASE WHEN backend_type = 'walsender' THEN 'walsender' ELSE 'backend of ' || application_name END
FROM pg_stat_activity WHERE datname = 'ours' AND application_name LIKE 'pmgsync%'
"""


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.sample(PORTS, len(PORTS)):
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((ADDRESS, port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


class _Node:
    """One node: its node.toml and its services."""

    def __init__(self, home: Path, name: str, dsn: str, ports: Sequence[int]) -> None:
        self.home, self.name, self.dsn, self.ports = home, name, dsn, ports
        self.commit = "on"
        self.run_dir = home / "r"
        self.config = home / "node.toml"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home.mkdir()
        self.write_config(self.config, ports)

    def write_config(self, path: Path, ports: Sequence[int]) -> None:
        events, control, join = ports
        path.write_text(
            f'[node]\nname = "{self.name}"\naddress = "{ADDRESS}"\nstate_dir = "{self.home / "state"}"\n'
            f'run_dir = "{self.run_dir}"\nprofile = "mirror"\n'
            f'[ports]\nevents = {events}\ncontrol = {control}\njoin = {join}\n[postgres]\ndsn = "{self.dsn}"\n'
            f'synchronous_commit = "{self.commit}"\n'
        )

    def start(self, service: str) -> None:
        parent = os.getpid()
        with (self.home / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                [sys.executable, "-m", SERVICES[service], "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
            )

    def stop(self, service: str) -> None:
        process = self.processes.pop(service, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def pmgcm(self, *arguments: str, config: Path | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "--config", str(config or self.config), *arguments],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"pmgcm {arguments[0]} on {self.name}:\n{done.stdout}{done.stderr}\n{self.log_tails()}")
        return done.stdout

    def log_tails(self) -> str:
        """Return the last lines of what the services say, for when something went wrong."""
        logs = [self.home / f"{service}.log" for service in SERVICES]
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in logs if path.exists())


class Ours:
    """A master, and a node on each other server that joined it.

    Args:
        may_cut: put a process between the master and the others that can cut their connections.
    """

    name = "ours"

    def __init__(self, servers: Servers, schema: str, *, may_cut: bool = False) -> None:
        self._servers, self._schema, self._may_cut = servers, schema, may_cut
        self.commit = "on"
        # Short, for the paths of unix sockets.
        self._home = Path(tempfile.mkdtemp(prefix="pmgb-"))
        self.publisher = servers.publisher.dsn("ours")
        self.subscribers: Sequence[str] = [server.dsn("ours") for server in servers.subscribers]
        ports = _free_ports(3 * (len(servers.subscribers) + 1) + 2)
        self._seen = ports[-2:]
        self.nodes = [
            _Node(self._home / f"n{number}", f"n{number}", dsn, ports[3 * number : 3 * number + 3])
            for number, dsn in enumerate((self.publisher, *self.subscribers))
        ]
        self._cutter: subprocess.Popen[str] | None = None
        self._mark = 0

    @property
    def master(self) -> _Node:
        return self.nodes[0]

    def start(self) -> None:
        """Make the databases and the cluster; all nodes are in step when this returns."""
        self.create()
        for node, server in zip(self.nodes[1:], self._servers.subscribers, strict=True):
            self._servers.create_database(server, "ours")
            self.join(node)
        self.settle()

    def create(self, *, fill: str = "") -> None:
        """Make the master's database and the cluster with it alone."""
        if not ask(self._servers.publisher.dsn(), "SELECT 1 FROM pg_database WHERE datname = 'ours'"):
            self._servers.create_database(self._servers.publisher, "ours")
            ask(self.publisher, self._schema)
        if fill:
            ask(self.publisher, fill)
        if self._may_cut:
            # The cluster document names the ports of the process between; the master itself listens on others.
            seen = self.master.home / "seen.toml"
            self.master.write_config(seen, [*self._seen, self.master.ports[2]])
            self.master.pmgcm("create", config=seen)
            pairs = [f"{seen_port}:{port}" for seen_port, port in zip(self._seen, self.master.ports, strict=False)]
            self._cutter = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.cut", *pairs],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            )  # fmt: skip
            assert self._cutter.stdout is not None
            self._cutter.stdout.readline()
        else:
            self.master.pmgcm("create")
        for service in SERVICES:
            self.master.start(service)
        self._await_broker(self.master)

    def join(self, node: _Node) -> None:
        """Have a node join."""
        for service in SERVICES:
            node.start(service)
        line = self.master.pmgcm("join-cmd").strip().splitlines()[-1].split()
        arguments = line[line.index("join") :]
        arguments[1] = ADDRESS
        node.pmgcm(*arguments, "--yes")

    def _await_broker(self, node: _Node) -> None:
        deadline = time.monotonic() + COMMAND_S
        while True:
            try:
                self._status(node)
                return
            except PmgsyncError:
                if time.monotonic() > deadline:
                    raise RuntimeError(node.log_tails()) from None
                time.sleep(0.05)

    @staticmethod
    def _status(node: _Node) -> dict[str, object]:
        with BrokerLink(node.run_dir / "broker.sock", "cli") as link:
            link.hello()
            answer: dict[str, object] = link.request({"op": "status"})[0]["status"]
            return answer

    def new_mark(self) -> int:
        """Return a number for a row of `mark` that is not there yet."""
        self._mark += 1
        return self._mark

    def with_commit(self, commit: str) -> None:
        """Have the nodes commit with this synchronous_commit from the next `resume` on, when their agents start."""
        self.commit = commit
        for node in self.nodes:
            node.commit = commit
            node.write_config(node.config, node.ports)

    def settle(self) -> None:
        """Wait until everything committed so far is everywhere."""
        mark = self.new_mark()
        ask(self.publisher, "INSERT INTO mark VALUES (%s)", (mark,))
        try:
            await_mark(self.subscribers, mark, within_s=COMMAND_S)
        except TimeoutError as error:
            raise RuntimeError("\n".join(node.log_tails() for node in self.nodes)) from error

    def pause(self) -> None:
        """Take no part while the other system is measured: nothing reads WAL or writes."""
        for node in self.nodes:
            node.stop("agent")

    def resume(self) -> None:
        """Go on, and be in step when this returns."""
        for node in self.nodes:
            if "agent" not in node.processes:
                node.start("agent")
        self.settle()

    def _tell_cutter(self, word: str) -> None:
        assert self._cutter is not None and self._cutter.stdin is not None
        self._cutter.stdin.write(f"{word}\n")
        self._cutter.stdin.flush()

    def cut(self) -> None:
        """End the connections to the master."""
        self._tell_cutter("cut")

    def captured(self, lsn: str) -> None:
        """Wait until the master's journal has everything up to there."""
        wanted, deadline = parse_lsn(lsn), time.monotonic() + CAPTURED_S
        while True:
            nodes = self._status(self.master)["nodes"]
            assert isinstance(nodes, list)
            reached = nodes[0]["watermark"]
            if reached is not None and parse_lsn(reached) >= wanted:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the journal is at {reached}, not at {lsn}\n{self.master.log_tails()}")
            time.sleep(0.05)

    def mend(self) -> float:
        """Let them connect again; returns when the first connection was there (monotonic)."""
        self._tell_cutter("mend")
        assert self._cutter is not None and self._cutter.stdout is not None
        return float(self._cutter.stdout.readline())

    def processes(self) -> Processes:
        """Return the processes at work."""
        found: dict[int, str] = {}
        for node in self.nodes:
            role = "master" if node is self.master else "slave"
            for service, process in node.processes.items():
                found[process.pid] = f"{role}: {service}"
                for pid, name in children(process.pid):
                    found[pid] = f"{role}: {name}"
        for role, server in self._servers.roles():
            found |= {pid: f"{role}: {kind}" for pid, kind in ask(server.dsn(), _BACKENDS)}
        return found

    def close(self) -> None:
        """End the services and leave nothing behind."""
        for service in reversed(SERVICES):
            for node in self.nodes:
                node.stop(service)
        if self._cutter is not None:
            assert self._cutter.stdin is not None
            self._cutter.stdin.close()
            self._cutter.terminate()
            self._cutter.wait()
        shutil.rmtree(self._home, ignore_errors=True)
