"""The server's setting `synchronous_standby_names`: it makes commits wait for what capture confirms.

It is the server's own and one for all of its databases, and an administrator may use it for physical standbys. So it is
set when it is empty, taken back when it is exactly what was set, and otherwise left alone.

That sessions show a value does not mean that commits wait. They look at a flag in shared memory, which the checkpointer
sets when it has read its configuration again (`sync_standbys_defined` in PostgreSQL's syncrep.c); that may take as long
as a checkpoint that is under way. Nothing shows the flag, so `commits_wait` proves it by a commit.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from enum import Enum

import psycopg2

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.names import CAPTURE
from pmgsync.postgres.session import connect

OURS = f'FIRST 1 ("{CAPTURE}")'
TAKEN_S = 5.0
"""So long the server may take to follow a change of the setting."""
POLL_S = 0.02
BREAK_S = 2.0
STATEMENT_MS = 10_000
_NAMES_CAPTURE = re.compile(rf'"{CAPTURE}"|(^|[\s,(])\*($|[\s,)])', re.IGNORECASE)


class Names(Enum):
    """What the setting says."""

    NONE = "none"
    OURS = "ours"
    BY_HAND = "by hand"
    """Capture is named, or everybody is, by somebody else's hand."""
    OTHERS = "others"


def read_names(setting: str) -> Names:
    """Return what a value of the setting says."""
    if not setting.strip():
        return Names.NONE
    if setting == OURS:
        return Names.OURS
    return Names.BY_HAND if _NAMES_CAPTURE.search(setting) else Names.OTHERS


class StandbyNames:
    """A session that reads and changes the setting. For one thread.

    Its methods raise UnreachableError when the session is lost, PmgsyncError when the server refuses.
    """

    def __init__(self, dsn: str) -> None:
        """Open the session.

        Raises:
            UnreachableError: when the server does not let it in.
        """
        self._dsn = dsn
        self._connection = connect(dsn, application_name="pmgsync synchronous")
        self._connection.autocommit = True
        self._run(f"SET statement_timeout = {STATEMENT_MS}")

    def close(self) -> None:
        """End the session; the setting stays as it is."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def now(self) -> Names:
        """Return what the setting says now."""
        return read_names(self._setting())

    def put(self) -> None:
        """Have commits wait for capture, once `commits_wait`. Only when nobody is named."""
        self._change(f"ALTER SYSTEM SET synchronous_standby_names = '{OURS}'", Names.OURS)

    def take_back(self) -> None:
        """Undo `put`. Commits that wait return, as if they had been confirmed. Only when the setting is ours."""
        self._change("ALTER SYSTEM RESET synchronous_standby_names", Names.NONE)

    def commits_wait(self) -> bool:
        """Commit something in a session of its own; True when it was seen to wait: then every later commit does.

        It is cancelled then, and needs no slave. A wait may be too short to be seen: nobody should confirm meanwhile.
        """
        with contextlib.closing(_OneCommit(self._dsn)) as commit:
            while not commit.over(POLL_S):
                waits = self._run(
                    "SELECT pg_catalog.pg_cancel_backend(pid) FROM pg_catalog.pg_stat_activity "
                    f"WHERE pid = {commit.pid} AND wait_event = 'SyncRep'"
                )
                if waits:
                    return True
        return False

    def break_waits(self) -> int:
        """End the sessions whose commit waits, and return how many: their clients must not be told that it is done."""
        ended: set[object] = set()
        deadline = time.monotonic() + BREAK_S
        while time.monotonic() < deadline:
            rows = self._run(
                "SELECT pid, pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
                "WHERE wait_event = 'SyncRep'"
            )
            if not rows:
                break
            ended |= {pid for pid, _ in rows}
            time.sleep(POLL_S)
        return len(ended)

    def _setting(self) -> str:
        ((value,),) = self._run("SELECT pg_catalog.current_setting('synchronous_standby_names')")
        assert isinstance(value, bytes)
        return as_text(value)

    def _change(self, statement: str, wanted: Names) -> None:
        self._run(statement)
        self._run("SELECT pg_catalog.pg_reload_conf()")
        deadline = time.monotonic() + TAKEN_S
        while (found := self.now()) is not wanted:
            if time.monotonic() > deadline:
                raise PmgsyncError(
                    f"the server does not take a change of synchronous_standby_names, it stays {found.value}",
                    hint="see its log, its command line, and the order of its configuration files",
                )
            time.sleep(POLL_S)

    def _run(self, statement: str) -> list[tuple[object, ...]]:
        with _errors(), self._connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


class _OneCommit:
    """A commit in a session and a thread of its own; it waits for slaves, whatever the database's defaults are."""

    def __init__(self, dsn: str) -> None:
        """Begin it.

        Raises:
            UnreachableError: when the server does not let the session in.
            PmgsyncError: when it refuses.
        """
        self._error: psycopg2.Error | None = None
        self._connection = connect(dsn, application_name="pmgsync proof")
        self._connection.autocommit = True
        self.pid = self._connection.info.backend_pid
        with _errors(), self._connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._connection.cursor() as cursor:
                # A message that capture only passes, as it does a barrier.
                cursor.execute("SELECT pg_catalog.pg_logical_emit_message(true, 'pmgsync', 'proof')")
        except psycopg2.Error as error:
            self._error = error

    def over(self, within_s: float) -> bool:
        """Wait for its end for so long; True when it has ended.

        Raises:
            UnreachableError: when the session was lost.
            PmgsyncError: when the server has refused it.
        """
        self._thread.join(within_s)
        if self._error is not None:
            with _errors():
                raise self._error
        return not self._thread.is_alive()

    def close(self) -> None:
        """Wait until it returns, which it does at once when it was cancelled, and end the session."""
        self._thread.join(BREAK_S)
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()


def forget_names(dsn: str, *, waits_return: bool = False) -> bool:
    """Take the setting back when it is ours, and return whether it was.

    Args:
        waits_return: clients whose commit waits are told that it is done; else their sessions are ended.

    Raises:
        UnreachableError: when the server does not answer.
        PmgsyncError: when it refuses.
    """
    with contextlib.closing(StandbyNames(dsn)) as session:
        if session.now() is not Names.OURS:
            return False
        if not waits_return:
            session.break_waits()
        session.take_back()
        return True


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"synchronous_standby_names cannot be changed ({str(error).strip()})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(
            f"synchronous_standby_names cannot be changed ({str(error).strip()})",
            hint=f"set it by hand to '{OURS}' on the master, and to '' on the other nodes",
        ) from error
