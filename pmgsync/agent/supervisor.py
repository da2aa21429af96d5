"""`pmgsync-agent`: the supervisor of the worker processes. It follows the cluster document and holds no state."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmgsync.agent.commit_hold import let_go
from pmgsync.agent.level import LevelWatch
from pmgsync.agent.worker import read_departed
from pmgsync.config import NodeConfig, load_config
from pmgsync.core.backoff import Backoff
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.profile_file import load_profile
from pmgsync.service import notify_systemd, set_up_logging
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

REPORT_S = 0.7
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 15.0
STEADY_S = 30.0
"""A worker that ran this long starts again after the first pause."""
STOP_S = 5.0
DIVERGENCE = "divergence"
"""The worker that ends by itself when nothing is left to do."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S))


class Supervisor:
    """Keeps one process running for every worker that the cluster document asks for."""

    def __init__(self, config: NodeConfig, config_path: Path | None) -> None:
        self._config = config
        self._config_path = config_path
        self._children: dict[str, _Child] = {}
        self._running = True
        self._level = LevelWatch(config.subscription)
        self._followed: tuple[int, ClusterDocument] | None = None

    def stop(self) -> None:
        """Make `run` end soon."""
        self._running = False

    def run(self) -> None:
        """Supervise until stopped."""
        link: BrokerLink | None = None
        self._level.start()
        try:
            while self._running:
                try:
                    if link is None:
                        link = BrokerLink(self._config.broker_socket, "supervisor")
                        welcome, parts = link.hello(timeout_s=2.0)
                        self._follow(welcome["cid"], parts, read_departed(welcome))
                    link.send(self._report())
                    received = link.receive(REPORT_S)
                    if received is not None:
                        message, parts = received
                        if message["op"] == "error":
                            raise UnreachableError(str(message.get("message")))
                        if message["op"] == "document":
                            self._follow(message["cid"], parts, read_departed(message))
                except PmgsyncError as error:
                    log.warning("action=broker-away error=%s", error)
                    if link is not None:
                        link.close()
                    link = None
                    time.sleep(0.2)
                self._start_ended()
        finally:
            self._end(list(self._children))
            if self._followed is not None:
                cid, document = self._followed
                let_go(self._config.dsn, document, cid)
            if link is not None:
                link.close()

    def _follow(self, cid: int, signed: Sequence[bytes], departed: Collection[int]) -> None:
        """Run the workers that a cluster document asks for; none without one.

        Args:
            departed: nodes that were removed and whose chains are not over here.
        """
        names: set[str] = set()
        self._followed = None
        if cid and signed:
            document = SignedDocument.unpack(signed[0]).document
            self._followed = cid, document
            if document.is_witness(cid):
                self._end(list(self._children))
                return
            names = {"capture", "snapshot"} | {f"apply:{other}" for other in {*document.databases, *departed} - {cid}}
            profile = load_profile(self._config.profile)
            if profile.files or profile.actions:
                names.add("files")
            if self._diverged():
                names.add(DIVERGENCE)
        self._end([name for name in self._children if name not in names])
        for name in names - self._children.keys():
            self._children[name] = _Child()
        self._start_ended()

    def _start_ended(self) -> None:
        now = time.monotonic()
        for name, child in list(self._children.items()):
            if child.process is not None and child.process.poll() is not None:
                log.warning("action=worker-ended worker=%s code=%d", name, child.process.returncode)
                over = name == DIVERGENCE and child.process.returncode == 0 and not self._diverged()
                child.process = None
                if over:
                    del self._children[name]
                    continue
                if now - child.started > STEADY_S:
                    child.backoff.succeeded()
                child.restart_at = now + child.backoff.failed()
            if child.process is None and now >= child.restart_at:
                command = [sys.executable, "-m", "pmgsync.agent.process", name, "--parent", str(os.getpid())]
                if self._config_path is not None:
                    command += ["--config", str(self._config_path)]
                child.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
                child.started = now
                log.info("action=worker-started worker=%s pid=%d", name, child.process.pid)

    def _diverged(self) -> bool:
        """Return True when something waits for the divergence worker."""
        try:
            return bool(DivergenceFiles(self._config.state_dir).pending())
        except PmgsyncError as error:
            log.error("action=divergence-unreadable error=%s", error)
            return True  # the worker says so in status

    def _report(self) -> Message:
        level = self._level
        said = {"state": "", "error": self._trouble(), "hint": "", "alerts": level.alerts(), "level": level.level}
        return {"op": "report", **said}

    def _trouble(self) -> str:
        waiting = sorted(name for name, child in self._children.items() if child.process is None)
        return f"not running, to be started again: {', '.join(waiting)}" if waiting else ""

    def _end(self, names: list[str]) -> None:
        processes = []
        for name in names:
            child = self._children.pop(name)
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
                processes.append(child.process)
        deadline = time.monotonic() + STOP_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run() -> None:
    """Entry point of `pmgsync-agent`."""
    parser = argparse.ArgumentParser(prog="pmgsync-agent", description="Capture and apply for a pmgsync node")
    parser.add_argument("--config", type=Path, help="node.toml; default: $PMGCM_CONFIG or /etc/pmgsync/node.toml")
    arguments = parser.parse_args()
    set_up_logging()
    try:
        supervisor = Supervisor(load_config(arguments.config), arguments.config)
    except PmgsyncError as error:
        log.error("action=stop error=%s", error)
        sys.exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    notify_systemd("READY=1")
    log.info("action=start")
    supervisor.run()
    log.info("action=stop")


if __name__ == "__main__":
    run()
