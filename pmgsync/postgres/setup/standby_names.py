"""The server's setting `synchronous_standby_names`: it makes commits wait for what capture confirms.

It is the server's own and one for all of its databases, and an administrator may use it for physical standbys. So it is
set when it is empty, taken back when it is exactly what was set, and otherwise left alone.
"""

from __future__ import annotations

import contextlib
import re
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
        """Have commits wait for capture. Only when nobody is named."""
        self._change(f"ALTER SYSTEM SET synchronous_standby_names = '{OURS}'", Names.OURS)

    def take_back(self) -> None:
        """Undo `put`. Commits that wait return, as if they had been confirmed. Only when the setting is ours."""
        self._change("ALTER SYSTEM RESET synchronous_standby_names", Names.NONE)

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
