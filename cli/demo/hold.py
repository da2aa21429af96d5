"""Holds a demo cluster: the process that starts its servers and services, and that leaves none of them behind.

It is a process of its own, so that whatever happens to the command in front of it, kill -9 included, everything is
stopped and removed: it does so as soon as its standard input ends, unless it was told to keep it. It writes one line of
JSON to standard output: what it started, or what was wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pmgsync.errors import PmgsyncError
from pmgsync.service import die_with_parent

if TYPE_CHECKING:
    from cli.demo.embedded import EmbeddedPostgres

DATABASE = "Proxmox_ruledb"
ADDRESS = "127.0.0.1"
PORTS_OF_A_NODE = 4
"""Events, control, join and key."""
SERVICES = {"broker": "broker.main", "agent": "pmgsync.agent.supervisor"}
KEEP = b"keep\n"
STOP_S = 10.0
PORTS = range(17_000, 32_000)
"""Below the range that outgoing connections take theirs from."""


@dataclass(frozen=True)
class DemoNode:
    """A node of the demo: its name, its connection string, and where its configuration, logs and socket are."""

    name: str
    dsn: str
    config: str
    directory: str

    def log(self, service: str) -> Path:
        """Return the path of a service's log."""
        return Path(self.directory) / f"{service}.log"


class _TerminatedError(BaseException):
    """SIGTERM came: clean up and end."""


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens on now."""
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(PORTS, len(PORTS)):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise PmgsyncError(f"fewer than {count} ports are free on {ADDRESS}")


def start_server(stack: ExitStack) -> EmbeddedPostgres:
    """Start a PostgreSQL server with an empty database of a gateway in it."""
    from cli.demo.embedded import EmbeddedPostgres
    from pmgsync.postgres.session import connect

    server = stack.enter_context(EmbeddedPostgres(initdb_args=["--encoding=SQL_ASCII", "--locale=C"]))
    connection = connect(server.dsn(), application_name="pmgcm demo")
    connection.autocommit = True
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE \"{DATABASE}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    schema = resources.files("cli.demo") / "pmg_schema.sql"
    connection = connect(server.dsn(DATABASE), application_name="pmgcm demo")
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(schema.read_bytes())
        connection.commit()
    return server


def write_config(node: DemoNode, ports: Sequence[int]) -> None:
    """Write a node's node.toml."""
    events, control, join, key = ports
    directory = Path(node.directory)
    quoted = {key: json.dumps(value) for key, value in asdict(node).items()}
    Path(node.config).write_text(
        f"[node]\nname = {quoted['name']}\naddress = {json.dumps(ADDRESS)}\n"
        f"state_dir = {json.dumps(str(directory / 'state'))}\nrun_dir = {json.dumps(str(directory / 'run'))}\n"
        f"profile = {json.dumps(str(write_profile(directory)))}\n"
        f"[ports]\nevents = {events}\ncontrol = {control}\njoin = {join}\nkey = {key}\n"
        # Whatever gateway there is on this machine has nothing to do with it.
        f'[postgres]\ndsn = {quoted["dsn"]}\n[files]\ncluster_conf = ""\n'
        f"config_root = {json.dumps(str(directory / 'etc'))}\nspool_root = {json.dumps(str(directory / 'spool'))}\n",
        encoding="utf-8",
    )


def write_profile(directory: Path) -> Path:
    """Write the profile `pmg` without what would touch the gateway of this machine, and return its path.

    That is a directory that no setting moves, and the commands to run after changes.
    """
    text = (resources.files("pmgsync") / "profiles/pmg.toml").read_text(encoding="utf-8")
    first, elsewhere, rest = text.partition('[[files]]\nkind = "config"\nroot = "/etc/mail/spamassassin"')
    spool, actions, _ = rest.partition("# --- what to do after a change")
    if not elsewhere or not actions:
        raise PmgsyncError("the profile pmg is not as the demo expects it")
    path = directory / "pmg.toml"
    path.write_text(first + "\n".join(spool.partition("\n\n")[2:]), encoding="utf-8")
    return path


def start_service(stack: ExitStack, node: DemoNode, service: str) -> None:
    """Start a node's broker or agent, as systemd would; it is stopped with the stack."""
    parent = os.getpid()
    with node.log(service).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", SERVICES[service], "--config", node.config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # This process has one thread, so it is safe; without it kill -9 of this one would leave services behind.
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
        )
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # The session is its own: whatever the service has started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_cluster(stack: ExitStack, count: int) -> tuple[Path, list[DemoNode]]:
    """Start everything of `count` nodes and return its directory and the nodes; no cluster is defined yet."""
    directory = Path(tempfile.mkdtemp(prefix="pmgsync-demo-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    ports = free_ports(PORTS_OF_A_NODE * count)
    nodes = []
    for number in range(1, count + 1):
        home = directory / f"pmg{number}"
        (home / "spool").mkdir(parents=True)
        server = start_server(stack)
        node = DemoNode(f"pmg{number}", server.dsn(DATABASE), str(home / "node.toml"), str(home))
        write_config(node, ports[PORTS_OF_A_NODE * (number - 1) : PORTS_OF_A_NODE * number])
        nodes.append(node)
    for node in nodes:
        for service in SERVICES:
            start_service(stack, node, service)
    return directory, nodes


def main() -> None:
    """Start a cluster of argv[1] nodes and hold it until standard input ends or SIGTERM comes."""
    signal.signal(signal.SIGTERM, _terminate)
    with contextlib.suppress(_TerminatedError), ExitStack() as stack:
        try:
            directory, nodes = start_cluster(stack, int(sys.argv[1]))
        except PmgsyncError as error:
            _answer({"error": error.message, "hint": error.hint})
            return
        except Exception as error:
            _answer({"error": f"{type(error).__name__}: {error}", "hint": ""})
            return
        _answer({"directory": str(directory), "nodes": [asdict(node) for node in nodes]})
        if sys.stdin.buffer.readline() == KEEP:
            # The command that started this ends, and with it what these were connected to.
            with Path(os.devnull).open("r+b") as null:
                for stream in (0, 1, 2):
                    os.dup2(null.fileno(), stream)
            signal.pause()


def _answer(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError


if __name__ == "__main__":
    main()
