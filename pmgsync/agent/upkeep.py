"""Upkeep: what the capture worker does in the database beside capture, in a thread and a session of its own.

Guard, watch and sequences, each at its interval. Whatever fails or is locked is shown as an alert and tried again;
capture never waits for any of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from pmgsync.core.ceilings import Ceilings
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.setup.upkeep_steps import UpkeepSession

log = logging.getLogger(__name__)

ROUND_S = 1.0
"""Between two looks at the sequences."""
KEEP_S = 5.0
REPEAT_S = 15.0
"""Between two times that every ceiling is published, for nodes that joined meanwhile."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts at something that stays locked: each one makes others wait an instant."""

Document = Callable[[], tuple[int, ClusterDocument] | None]


class Upkeep:
    """Keeps a node's database in order for as long as the process lives.

    Attributes:
        alerts: what is wrong, for the worker's report; replaced as a whole.
    """

    def __init__(self, dsn: str, profile: Profile, document: Document) -> None:
        """Prepare.

        Args:
            document: returns this node's CID and the cluster document, None while they are not known.
        """
        self.alerts: list[dict[str, str]] = []
        self._dsn = dsn
        self._profile = profile
        self._document = document
        self._ceilings = Ceilings()
        self._problems: dict[str, str] = {}
        self._next: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self._next_repeat = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """End it; what it is doing in the database ends with its session."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause = ROUND_S
        while not self._over.wait(pause):
            try:
                with contextlib.closing(UpkeepSession(self._dsn, self._profile)) as session:
                    pause = ROUND_S
                    while not self._over.wait(ROUND_S):
                        self._round(session)
            except PmgsyncError as error:
                # That the database is away is shown by whoever cannot work without it.
                log.info("action=upkeep-later error=%s", error)
                pause = min(pause * 2, LONGEST_PAUSE_S / 4)
            # Whether the newest message was committed is not known.
            self._ceilings.forget()

    def _round(self, session: UpkeepSession) -> None:
        known = self._document()
        if known is None:
            return
        cid, document = known
        master = document.member(document.master)
        is_master = document.master == cid
        if is_master and len(document.members) > 1:
            self._do("sequence", ROUND_S, lambda: self._sequences(session))
        else:
            self._ceilings.forget()
        if is_master or master is not None:
            self._do("guard", KEEP_S, lambda: session.keep_guard(None if is_master else master))
        self._do("watch", KEEP_S, session.keep_publication)
        self.alerts = [{"kind": kind, "text": text} for kind, text in self._problems.items()]

    def _sequences(self, session: UpkeepSession) -> None:
        now = time.monotonic()
        if now >= self._next_repeat:
            self._next_repeat = now + REPEAT_S
            self._ceilings.repeat()
        session.publish_sequences(self._ceilings)

    def _do(self, kind: str, interval_s: float, work: Callable[[], object]) -> None:
        """Do something when it is time to.

        Raises:
            UnreachableError: when the session is lost.
        """
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            return
        try:
            work()
        except UnreachableError:
            raise
        except PmgsyncError as error:
            text = str(error)
            if self._problems.get(kind) != text:
                log.warning("action=upkeep kind=%s error=%s", kind, text)
            self._problems[kind] = text
            self._pause[kind] = min(self._pause.get(kind, interval_s) * 1.5, LONGEST_PAUSE_S)
            self._next[kind] = time.monotonic() + self._pause[kind]
            return
        self._problems.pop(kind, None)
        self._pause.pop(kind, None)
        self._next[kind] = now + interval_s
