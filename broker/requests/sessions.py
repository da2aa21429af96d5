"""Sessions of this machine's own processes on the local socket: name, newest report, and the methods they serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from broker.heartbeats.conflicts import read_counters
from broker.members.calls import Attachments
from broker.net.local_port import LocalPort
from pmgsync.core.trees import read_action_reports, read_tree_reports
from pmgsync.errors import MembershipError
from pmgsync.subscription import MAX_LEVEL
from pmgsync.wire.messages import pack

WORKER_GONE_S = 3.0
"""A worker says something at least once a second."""
CLIENT_GONE_S = 120.0
"""Clients have no heartbeat; what they left behind is removed after this."""
CLIENTS = frozenset({"cli", "fetch"})
"""The command line, and a worker's sessions beside its own; there may be many of a name."""


@dataclass(slots=True, eq=False)
class Session:
    """One process's connection."""

    identity: bytes
    worker: str
    pid: int = 0
    heard: float = field(default_factory=time.monotonic)
    state: str = ""
    error: str = ""
    hint: str = ""
    error_since: float = 0.0
    alerts: list[dict[str, str]] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    trees: list[dict[str, Any]] = field(default_factory=list)
    level: str = ""
    actions: list[dict[str, Any]] = field(default_factory=list)
    methods: frozenset[str] = frozenset()

    def report(self, message: Mapping[str, Any]) -> None:
        """Take over what a worker says of itself."""
        error = str(message.get("error", ""))[:2000]
        if error and not self.error:
            self.error_since = time.monotonic()
        self.state = str(message.get("state", ""))[:200]
        self.error = error
        self.hint = str(message.get("hint", ""))[:2000]
        alerts = message.get("alerts", [])
        self.alerts = [
            {str(key): str(value)[:2000] for key, value in alert.items()}
            for alert in (alerts if isinstance(alerts, list) else [])[:50]
            if isinstance(alert, dict)
        ]
        self.counters = read_counters(message.get("counters"))
        self.level = str(message.get("level", ""))[:MAX_LEVEL]
        self.trees = read_tree_reports(message.get("trees"))
        self.actions = read_action_reports(message.get("actions"))


class Sessions:
    """All sessions, by the identity of their connection."""

    def __init__(self, port: LocalPort, gone: Callable[[Session], None]) -> None:
        self._port = port
        self._gone = gone
        self._by_identity: dict[bytes, Session] = {}

    def get(self, identity: bytes) -> Session | None:
        """Return the session of an identity, and note that it is alive."""
        session = self._by_identity.get(identity)
        if session is not None:
            session.heard = time.monotonic()
        return session

    def begin(self, identity: bytes, worker: str, pid: int) -> Session:
        """Begin a session; an earlier one of the same worker is over when its process is.

        Raises:
            MembershipError: when another living process does that work.
        """
        for old in list(self._by_identity.values()):
            if old.worker == worker and worker not in CLIENTS and old.identity != identity:
                if old.pid not in {0, pid} and psutil.pid_exists(old.pid) and not _is_zombie(old.pid):
                    raise MembershipError(
                        f"another process does the work of {worker} here, pid {old.pid}",
                        hint="a second pmgsync-agent was started on this node: stop it",
                    )
                self.end(old)
        session = Session(identity, worker, pid)
        self._by_identity[identity] = session
        return session

    def end(self, session: Session) -> None:
        """Forget a session and all it had open."""
        if self._by_identity.pop(session.identity, None) is not None:
            self._gone(session)

    def over(self, identity: bytes) -> None:
        """End the session of a connection that has ended, if there is one."""
        session = self._by_identity.get(identity)
        if session is not None:
            self.end(session)

    def worker(self, name: str) -> Session | None:
        """Return the session of a worker."""
        return next((session for session in self._by_identity.values() if session.worker == name), None)

    def serving(self, method: str) -> Session | None:
        """Return a session that answers calls of a method."""
        return next((session for session in self._by_identity.values() if method in session.methods), None)

    def workers(self) -> list[Session]:
        """Return the sessions of agent workers."""
        return [session for session in self._by_identity.values() if session.worker not in CLIENTS]

    def all(self) -> list[Session]:
        """Return every session."""
        return list(self._by_identity.values())

    def send(self, identity: bytes, message: Mapping[str, Any], attachments: Attachments = ()) -> bool:
        """Send to a session; one that is gone is ended. Returns False then."""
        if self._port.send(identity, (pack(message), *attachments)):
            return True
        self.over(identity)
        return False

    def expire(self) -> None:
        """End sessions that have fallen silent."""
        now = time.monotonic()
        for session in self.all():
            if now - session.heard > (CLIENT_GONE_S if session.worker in CLIENTS else WORKER_GONE_S):
                self.end(session)


def _is_zombie(pid: int) -> bool:
    """True when a process has ended and nobody has asked for its exit code yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
