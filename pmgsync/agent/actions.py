"""Actions: the commands that a profile asks for after changes, each once a batch, with a time limit and new tries.

A file's action waits for the rows before it. The announcement of a configuration carries where the owner's chain was
after the change. A table's action waits for the files: until no configuration is known to be behind. Actions run then,
or 30 s later, once for what came together. What is owed is on disk
before the files are placed: after a crash an action runs once more rather than not at all.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from pmgsync.core.backoff import Backoff
from pmgsync.core.profile import Profile
from pmgsync.core.trees import MAX_ACTIONS, touched_actions
from pmgsync.errors import PmgsyncError
from pmgsync.files.cache import Cache

log = logging.getLogger(__name__)

Command = tuple[str, ...]
TIME_LIMIT_S = 60.0
OUTPUT_BYTES = 4096
"""Of a command's output, the end is looked at when it has failed."""
TRIES = 6
FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 120.0
TOGETHER_S = 0.5
"""What is asked for within this counts as one batch."""
ROWS_POLL_S = 0.2
"""Between two looks whether the rows have come."""
ROWS_S = 30.0
"""So long an action waits for the rows that were committed before the files changed."""
_OWED = "actions"
"""Where the cache has the commands that are owed; no tree is called so."""


@dataclass(slots=True)
class _Owed:
    due: float
    wanted_at: float
    origins: dict[int, int] = field(default_factory=dict)
    tries: Backoff = field(default_factory=lambda: Backoff(FIRST_RETRY_S, LONGEST_RETRY_S))
    failures: int = 0


class Actions:
    """Runs them in a thread of its own. What is owed is on disk before a batch is placed: it runs after a crash too."""

    def __init__(
        self,
        profile: Profile,
        cache: Cache,
        *,
        applied: Callable[[int, int], bool],
        settled: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        """Begin with what was owed when this node went down.

        Args:
            applied: returns True when a chain (origin, LSN) is applied here so far.
            settled: returns True when no configuration is known to be behind its owner here.
            changed: called when there is something to tell.
        """
        self._profile = profile
        self._cache = cache
        self._applied = applied
        self._settled = settled
        self._changed = changed
        self._condition = threading.Condition()
        self._owed: dict[Command, _Owed] = {}
        self._failed: dict[Command, str] = {}
        self._outcomes: dict[Command, tuple[int, str]] = {}
        for command in self._noted():
            self._owed[command] = _Owed(time.monotonic(), time.monotonic())
        threading.Thread(target=self._run, name="actions", daemon=True).start()

    def expect(self, paths: Iterable[bytes] = (), tables: Collection[str] = (), role: str = "") -> list[Command]:
        """Return what a batch will ask for, and note it on disk.

        Raises:
            FilesError: when it cannot be noted.
        """
        commands = touched_actions(self._profile, paths, tables, role)
        for command in commands:
            self._cache.note(_OWED, msgpack.packb(list(command)).hex(), "owed")
        return commands

    def request(self, commands: Iterable[Command], origin: int = 0, lsn: int = 0) -> None:
        """Have commands run soon; `origin` and `lsn`: once that chain is applied so far."""
        with self._condition:
            now = time.monotonic()
            for command in commands:
                owed = self._owed.setdefault(command, _Owed(now, now))
                owed.due = now + TOGETHER_S
                owed.wanted_at = now
                owed.failures = 0
                if lsn:
                    owed.origins[origin] = max(lsn, owed.origins.get(origin, 0))
            self._condition.notify()

    def alerts(self) -> list[str]:
        """Return a sentence for each command that failed the last time."""
        with self._condition:
            return list(self._failed.values())

    def outcomes(self) -> list[dict[str, Any]]:
        """Return how the commands went that ran last, the newest first (PROTOCOL.md, section 6)."""
        with self._condition:
            newest = [*self._outcomes.items()][: -MAX_ACTIONS - 1 : -1]
        return [{"run": " ".join(command), "at": at, "error": error} for command, (at, error) in newest]

    def _noted(self) -> list[Command]:
        return [tuple(msgpack.unpackb(bytes.fromhex(key))) for key in self._cache.facts(_OWED)]

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                due = {command: dict(owed.origins) for command, owed in self._owed.items() if owed.due <= now}
                late = {command for command in due if now - self._owed[command].wanted_at > ROWS_S}
                if not due:
                    waits = [owed.due - now for owed in self._owed.values()]
                    self._condition.wait(min(waits) if waits else None)
                    continue
            ready = [command for command, origins in due.items() if command in late or self._in_place(origins)]
            for command in ready:
                try:
                    self._run_one(command)
                except PmgsyncError as error:
                    # It is noted as owed and runs once more: better than not at all.
                    log.warning("action=run-not-noted command=%s error=%s", command, error)
            if not ready:
                time.sleep(ROWS_POLL_S)

    def _in_place(self, origins: dict[int, int]) -> bool:
        return self._settled() and all(self._applied(origin, lsn) for origin, lsn in origins.items())

    def _run_one(self, command: Command) -> None:
        with self._condition:
            started_for = self._owed[command].wanted_at
        problem = execute(command)
        with self._condition:
            owed = self._owed[command]
            self._outcomes.pop(command, None)
            self._outcomes[command] = int(time.time()), problem
            if problem:
                owed.failures += 1
                pause_s = owed.tries.failed()
                last = owed.failures >= TRIES
                again = "it is not tried again" if last else f"tried again in {pause_s:.0f} s"
                log.warning("action=run-failed command=%s problem=%s %s", command, problem, again)
                self._failed[command] = f"the action {' '.join(command)!r} failed: {problem}; {again}"
                owed.due = time.monotonic() + pause_s
                if not last:
                    self._changed()
                    return
            else:
                log.info("action=run command=%s", command)
                self._failed.pop(command, None)
            # What was asked for meanwhile is one more batch.
            if owed.wanted_at == started_for:
                del self._owed[command]
                self._cache.forget_fact(_OWED, msgpack.packb(list(command)).hex())
        self._changed()


def execute(command: Command) -> str:
    """Run a command and return what went wrong, "" when nothing did."""
    try:
        # No pipe: a service that the command starts would hold it open, and look like a command that does not end.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(TIME_LIMIT_S)
            except subprocess.TimeoutExpired:
                # With it what it has started.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"it took longer than {TIME_LIMIT_S:.0f} s and was killed"
            if code == 0:
                return ""
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
            lines = output.read().decode(errors="backslashreplace").strip().splitlines()
    except OSError as error:
        return f"it cannot be started ({error.strerror})"
    return f"exit code {code}" + (f", {lines[-1][:200]}" if lines else "")
