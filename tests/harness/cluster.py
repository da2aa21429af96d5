"""A cluster under test: real PostgreSQL servers, real broker and agent processes, the real command line."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg2

from cli.local_node import read_status
from cli.wait import await_everyone
from pmgsync.config import load_config
from pmgsync.postgres.programs import BINDIR_VARIABLE
from pmgsync.wire.link import BrokerLink
from tests.harness.schema import STANDARD
from tests.harness.template import CopiedServer, Template

# Below the ports that the kernel gives to outgoing connections, which would take one between its choice and its use,
# and below those that a demo or a benchmark takes, which run beside tests.
FIRST_PORT, BLOCK, BLOCKS = 12_000, 300, 60
WAIT_S = 150


@functools.cache
def _own_ports() -> Iterator[int]:
    """Return ports that no other test process on this machine takes: a block is this one's until it ends."""
    for block in random.sample(range(BLOCKS), BLOCKS):
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0pmgsync-test-ports-{block}")
        except OSError:
            lock.close()
            continue
        lock.detach()
        first = FIRST_PORT + block * BLOCK
        return itertools.cycle(range(first, first + BLOCK))
    raise AssertionError(f"{BLOCKS} test processes have taken all ports")


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Return ports that nobody listens on now."""
    found: list[int] = []
    while len(found) < count:
        port = next(_own_ports())
        with contextlib.closing(socket.socket()) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        found.append(port)
    return found


def eventually(condition: Callable[[], Any], *, within_s: float = 60.0, what: str = "") -> Any:
    """Return the first true value of a condition.

    Raises:
        AssertionError: when there is none in time.
    """
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:.0f} s: {what or condition}")
        time.sleep(0.05)


class Node:
    """One node: a server, a state directory, two services."""

    def __init__(self, directory: Path, name: str, *, profile: str, dbname: str, address: str, extra: str = "") -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.name = name
        self.dbname = dbname
        self.address = address
        # Locks for the tests with thousands of tables; every server here gets the same.
        self.server = CopiedServer(settings={"max_locks_per_transaction": "512"})
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # Unix socket paths are short: the run directory cannot lie beneath pytest's.
        self.run_dir = Path(tempfile.mkdtemp(prefix="pmgsync-run-"))
        self.events, self.control, self.join, self.key = free_ports(4)
        self.config = directory / "node.toml"
        self.profile = profile
        self.extra = extra
        # A witness has none.
        self.has_database = True
        # Runs a command in this node's network namespace, when it has one of its own.
        self.within: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Start the server and write node.toml."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.server.start()
        self.write_config()

    def write_config(self, **ports: int) -> None:
        """Write node.toml; `ports` overrides what others see of it."""
        dsn = self.server.dsn(self.dbname) if self.has_database else "host=/nowhere dbname=none"
        self.config.write_text(
            f'''[node]
name = "{self.name}"
address = "{self.address}"
state_dir = "{self.state_dir}"
run_dir = "{self.run_dir}"
profile = "{self.profile}"
[ports]
events = {ports.get("events", self.events)}
control = {ports.get("control", self.control)}
join = {ports.get("join", self.join)}
key = {self.key}
[postgres]
dsn = "{dsn}"
{self.extra.replace("{directory}", str(self.directory))}
'''
        )

    # -- SQL ----------------------------------------------------------------------------------------------------------

    def sql(
        self, statement: str, parameters: Sequence[object] | None = None, *, dbname: str | None = None
    ) -> list[Any]:
        """Run SQL in a transaction of its own and return the rows, if any."""
        connection = psycopg2.connect(self.server.dsn(dbname or self.dbname))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def create_database(self, *, encoding: str = "UTF8") -> None:
        """Create this node's database, empty."""
        connection = psycopg2.connect(self.server.dsn("postgres"))
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(
                    f"CREATE DATABASE \"{self.dbname}\" ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' "
                    "TEMPLATE template0"
                )
        finally:
            connection.close()

    def content(self, table: str, columns: str = "*") -> list[str]:
        """Return a table's rows as text, sorted."""
        return sorted(row[0] for row in self.sql(f"SELECT t::text FROM (SELECT {columns} FROM {table}) AS t"))

    # -- services -----------------------------------------------------------------------------------------------------

    def start(self, *services: str) -> None:
        """Start services; both when none is named."""
        for service in services or ("broker", "agent"):
            running = self.processes.get(service)
            if running is not None and running.poll() is None:
                continue
            module = "broker.main" if service == "broker" else "pmgsync.agent.supervisor"
            with (self.directory / f"{service}.log").open("ab") as log:
                self.processes[service] = subprocess.Popen(
                    [*self.within, sys.executable, "-m", module, "--config", str(self.config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def kill(self, service: str, number: int = signal.SIGKILL) -> None:
        """Send a service a signal; after SIGKILL or SIGTERM wait for its end."""
        process = self.processes[service]
        process.send_signal(number)
        if number in {signal.SIGKILL, signal.SIGTERM}:
            process.wait(15)

    def workers(self) -> dict[str, psutil.Process]:
        """Return the agent's worker processes by name."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.processes["agent"].pid).children():
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    found[child.cmdline()[3]] = child
        return found

    def stop(self) -> None:
        """End both services."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End everything and leave nothing behind."""
        self.stop()
        self.server.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def log(self, service: str) -> str:
        """Return what a service has logged."""
        path = self.directory / f"{service}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # -- the command line ---------------------------------------------------------------------------------------------

    def pmgcm(self, *arguments: str, check: bool = True, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run `pmgcm` as a person would."""
        done = subprocess.run(
            [*self.within, sys.executable, "-m", "cli.main", "--config", str(self.config), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        if check and done.returncode:
            raise AssertionError(
                f"pmgcm {' '.join(arguments)} on {self.name}: exit {done.returncode}\n{done.stdout}{done.stderr}\n"
                f"--- broker\n{self.log('broker')[-3000:]}\n--- agent\n{self.log('agent')[-3000:]}"
            )
        return done

    def status(self) -> dict[str, Any]:
        """Return the map of `pmgcm status --json`, from the broker itself: it is asked many times."""
        with BrokerLink(self.run_dir / "broker.sock", "cli") as link:
            link.hello(WAIT_S)
            return read_status(link)

    def node_status(self, cid: int) -> dict[str, Any]:
        """Return one node's part of the status, as this node sees it."""
        return next(node for node in self.status()["nodes"] if node["cid"] == cid)


class Cluster:
    """Several nodes; the first is created, the others join it."""

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 2,
        profile: str = "mirror",
        schema: str = "",
        dbname: str = "app",
        encoding: str = "UTF8",
        extra: str = "",
        seed: Callable[[Node], None] | None = None,
        namespaces: Sequence[str] = (),
    ) -> None:
        self.schema = schema
        self.seed = seed
        self._directory = directory
        self.encoding = encoding
        self.nodes = [
            Node(
                directory / f"node{number}",
                f"node{number}",
                profile=profile,
                dbname=dbname,
                address="127.0.0.1",
                extra=extra,
            )
            for number in range(1, nodes + 1)
        ]
        for number, (node, namespace) in enumerate(zip(self.nodes, namespaces, strict=False), 1):
            node.address = f"10.213.7.{number}"
            node.within = ("ip", "netns", "exec", namespace)

    @property
    def master(self) -> Node:
        return self.nodes[0]

    def start(self) -> None:
        """Bring the whole cluster up."""
        if not self._is_standard():
            self._make()
            return
        template = Template(f"{Path(os.environ[BINDIR_VARIABLE]).parent.name}-{len(self.nodes)}")
        with template.held() as there:
            if there:
                template.load(self.nodes)
            else:
                self._make()
                self.wait()
                for node in self.nodes:
                    node.stop()
                    node.server.stop()
                    for log in node.directory.glob("*.log"):
                        log.unlink()  # a copy has none either
                template.save(self.nodes)
        for node in self.nodes:
            node.prepare()
            node.start()
        self.wait()

    def _is_standard(self) -> bool:
        usual = ("mirror", "app", "127.0.0.1")
        return (self.schema, self.encoding, self.seed) == (STANDARD, "UTF8", None) and all(
            (node.profile, node.dbname, node.address) == usual for node in self.nodes
        )

    def _make(self) -> None:
        """Make every node, have the first create the cluster and the others join it."""
        for node in self.nodes:
            node.prepare()
            node.create_database(encoding=self.encoding)
        if self.schema:
            self.master.sql(self.schema)
        if self.seed is not None:
            self.seed(self.master)
        self.master.start()
        self.master.pmgcm("create")
        for node in self.nodes[1:]:
            self.join(node)

    def add_node(self, name: str) -> Node:
        """Return one more node like the others, which has not joined yet."""
        like = self.master
        node = Node(
            self._directory / name,
            name,
            profile=like.profile,
            dbname=like.dbname,
            address=like.address,
            extra=like.extra,
        )
        self.nodes.append(node)
        node.prepare()
        node.create_database(encoding=self.encoding)
        return node

    def join(self, node: Node) -> None:
        """Have a node join, with the line that the master prints."""
        node.start()
        node.pmgcm(*self.join_arguments())

    def join_arguments(self) -> list[str]:
        """Return the arguments of the line that `join-cmd` prints, with --yes."""
        line = self.master.pmgcm("join-cmd").stdout.strip().splitlines()[-1].split()
        return [*line[line.index("join") :], "--yes"]

    def wait(self, *, node: Node | None = None, timeout_s: int = WAIT_S) -> None:
        """Wait as `pmgcm wait` does, until everything committed is applied everywhere."""
        node = node or self.master
        node.status()  # waits for a broker that was just started
        behind, _ = await_everyone(load_config(node.config), time.monotonic() + timeout_s)
        logs = "\n".join(f"--- {name} of {n.name}\n{n.log(name)[-3000:]}" for n in self.nodes for name in n.processes)
        assert not behind, f"not within {timeout_s} s: {behind}\n{logs}"

    def assert_equal(self, tables: Iterable[str], columns: str = "*") -> None:
        """Check that tables have the same content on every node."""
        for table in tables:
            expected = self.master.content(table, columns)
            for node in self.nodes[1:]:
                assert node.content(table, columns) == expected, f"{table} differs on {node.name}"

    def close(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.close()
