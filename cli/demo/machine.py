"""One machine of the demo: a PostgreSQL server and the two services, as the process that holds them runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from pmgsync.service import die_with_parent

if TYPE_CHECKING:
    from cli.demo.embedded import EmbeddedPostgres

DATABASE = "Proxmox_ruledb"
SERVICES = {"broker": "broker.main", "agent": "pmgsync.agent.supervisor"}
STOP_S = 10.0


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


class Machine:
    """What runs for a node; it can be lost at once and started again, on the same data.

    Attributes:
        node: set once its configuration is written.
    """

    def __init__(self, server: EmbeddedPostgres) -> None:
        self.node: DemoNode | None = None
        self._server = server
        self._services: list[subprocess.Popen[bytes]] = []

    @property
    def dsn(self) -> str:
        """The connection string of its database."""
        return self._server.dsn(DATABASE)

    def start(self) -> None:
        """Start what does not run: the server, then the services.

        Raises:
            PmgsyncError: when the server does not come up.
        """
        if not self._server.running:
            self._server.start()
        if not self._services:
            assert self.node is not None
            self._services = [_start_service(self.node, service) for service in SERVICES]

    def kill(self) -> None:
        """End everything by SIGKILL, as a loss of power would; returns when all is gone."""
        for process in self._services:
            _kill(process)
        self._services = []
        self._server.kill()

    def stop(self) -> None:
        """Stop the services in order; the server is stopped by whoever has made it."""
        for process in reversed(self._services):
            process.terminate()
        for process in reversed(self._services):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            _kill(process)
        self._services = []


def start_server(stack: ExitStack) -> EmbeddedPostgres:
    """Start a PostgreSQL server with an empty database of a gateway in it; it ends with the stack."""
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


def _start_service(node: DemoNode, service: str) -> subprocess.Popen[bytes]:
    """Start a node's broker or agent, as systemd would."""
    parent = os.getpid()
    with node.log(service).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", SERVICES[service], "--config", node.config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # This process has one thread, so it is safe; without it kill -9 of this one would leave services behind.
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The session is its own: whatever the service has started goes with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
