"""Actions: the commands that a profile asks for after changes, each once a batch, with a time limit and new tries.

A file's action waits for the rows before it. The announcement of a configuration carries where the owner's chain was
after the change. Actions run once that is applied, or 30 s later, once for what came together. What is owed is on disk
before the files are placed: after a crash an action runs once more rather than not at all.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import msgpack

from pmgsync.core.backoff import Backoff
from pmgsync.core.profile import Profile
from pmgsync.core.trees import touched_actions
from pmgsync.files.cache import Cache

log = logging.getLogger(__name__)

Command = tuple[str, ...]
TIME_LIMIT_S = 60.0
TRIES = 6
FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 120.0
TOGETHER_S = 0.5
"""What is asked for within this counts as one batch."""
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
        self, profile: Profile, cache: Cache, *, applied: Callable[[int, int], bool], changed: Callable[[], None]
    ) -> None:
        """Begin with what was owed when this node went down.

        Args:
            applied: returns True when a chain (origin, LSN) is applied here so far.
            changed: called when there is something to tell.
        """
        self._profile = profile
        self._cache = cache
        self._applied = applied
        self._changed = changed
        self._condition = threading.Condition()
        self._owed: dict[Command, _Owed] = {}
        self._failed: dict[Command, str] = {}
        for command in self._noted():
            self._owed[command] = _Owed(time.monotonic(), time.monotonic())
        threading.Thread(target=self._run, name="actions", daemon=True).start()

    def expect(self, paths: Iterable[bytes] = (), tables: Collection[str] = ()) -> list[Command]:
        """Return what a batch will ask for, and note it on disk."""
        commands = touched_actions(self._profile, paths, tables)
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
                if lsn:
                    owed.origins[origin] = max(lsn, owed.origins.get(origin, 0))
            self._condition.notify()

    def alerts(self) -> list[str]:
        """Return a sentence for each command that failed the last time."""
        with self._condition:
            return list(self._failed.values())

    def _noted(self) -> list[Command]:
        return [tuple(msgpack.unpackb(bytes.fromhex(key))) for key in self._cache.facts(_OWED)]

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                ready = [command for command, owed in self._owed.items() if owed.due <= now and self._in_place(owed)]
                if not ready:
                    waits = [owed.due - now for owed in self._owed.values()]
                    # Whether the rows have come is asked again and again.
                    self._condition.wait(max(0.1, min(waits)) if waits else None)
                    continue
            for command in ready:
                self._run_one(command)

    def _in_place(self, owed: _Owed) -> bool:
        if time.monotonic() - owed.wanted_at > ROWS_S:
            return True
        return all(self._applied(origin, lsn) for origin, lsn in owed.origins.items())

    def _run_one(self, command: Command) -> None:
        with self._condition:
            started_for = self._owed[command].wanted_at
        problem = execute(command)
        with self._condition:
            owed = self._owed[command]
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
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {TIME_LIMIT_S:.0f} s and was killed"
    except OSError as error:
        return f"it cannot be started ({error.strerror})"
    if done.returncode == 0:
        return ""
    output = done.stdout.decode(errors="backslashreplace").strip().splitlines()
    return f"exit code {done.returncode}" + (f", {output[-1][:200]}" if output else "")
