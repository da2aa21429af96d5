"""Upkeep: what the capture worker does in the database beside capture, in a thread and a session of its own.

Guard, watch and sequences, each at its own interval; and, on a node that has become master, the sequences once, before
its tables open. Whoever finds that undone does it, so a promotion may be killed before. What fails or is locked is
shown as an alert and tried again. Capture never waits for any of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from pmgsync.agent.fence import Fence
from pmgsync.core.backoff import Backoff
from pmgsync.core.ceilings import Ceilings
from pmgsync.core.lease import reign_began
from pmgsync.core.membership import ClusterDocument, Member
from pmgsync.core.profile import Profile
from pmgsync.errors import UnreachableError
from pmgsync.postgres.setup.upkeep_steps import StepFailedError, UpkeepSession

log = logging.getLogger(__name__)

ROUND_S = 1.0
"""Between two looks at the sequences."""
OPEN_S = 0.05
"""So often it is looked whether a master without a fence may open its tables, until it may."""
REIGN_S = 0.2
"""Between two attempts to pass the sequences of a new master: its tables stay closed so long."""
KEEP_S = 5.0
"""Between two looks at guard and watch."""
REPEAT_S = 15.0
"""Between two times that every ceiling is published, for nodes that joined meanwhile."""
RECONNECT_LONGEST_S = 15.0
LONGEST_PAUSE_S = 60.0
"""Between two attempts at something that stays locked: each one makes others wait an instant."""
PAUSE_FACTOR = 1.5

Document = Callable[[], tuple[int, ClusterDocument] | None]


@dataclass(slots=True)
class _Duty:
    """One thing that is done again and again."""

    interval_s: float
    backoff: Backoff
    due: float = 0.0
    problem: str = ""


def _duty(interval_s: float) -> _Duty:
    return _Duty(interval_s, Backoff(interval_s * PAUSE_FACTOR, LONGEST_PAUSE_S, factor=PAUSE_FACTOR))


class Upkeep:
    """Keeps a node's database in order for as long as the process lives.

    Attributes:
        alerts: what is wrong, for the worker's report; replaced as a whole.
    """

    def __init__(
        self,
        dsn: str,
        profile: Profile,
        document: Document,
        fence: Fence,
        may_open: Callable[[ClusterDocument], bool],
    ) -> None:
        """Prepare.

        Args:
            document: returns this node's CID and the cluster document, None while they are not known.
            fence: what the broker says of a master's fence.
            may_open: says whether a master may take its guard away, when nothing else keeps its tables closed.
        """
        self.alerts: list[dict[str, str]] = []
        self._dsn = dsn
        self._profile = profile
        self._document = document
        self._fence = fence
        self._may_open = may_open
        self._pause_s = ROUND_S
        self._ceilings = Ceilings()
        self._duties = {name: _duty(ROUND_S) for name in ("reign", "sequence")} | {
            name: _duty(KEEP_S) for name in ("guard", "watch")
        }
        self._reign = 0
        self._next_repeat = 0.0
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._thread.is_alive():
            self._thread.start()

    def _run(self) -> None:
        backoff = Backoff(ROUND_S, RECONNECT_LONGEST_S)
        pause_s = ROUND_S
        while True:
            self._fence.wait(pause_s)
            try:
                with closing(UpkeepSession(self._dsn, self._profile)) as session:
                    backoff.succeeded()
                    hurries = True
                    while True:
                        if hurries:
                            self._duties["reign"].due = self._duties["guard"].due = 0.0
                        self.round(session)
                        hurries = self._fence.wait(self._pause_s) or self._pause_s < ROUND_S
            except UnreachableError as error:
                # Capture and apply report that the database is away.
                log.info("action=upkeep-later error=%s", error)
                pause_s = backoff.failed()
            # Whether the newest message was committed is not known.
            self._ceilings.forget()

    def round(self, session: UpkeepSession) -> None:
        """Do what is due.

        Raises:
            UnreachableError: when the session is lost.
        """
        known = self._document()
        if known is None:
            return
        cid, document = known
        master, reign = document.member(document.master), reign_began(document)
        is_master = document.master == cid
        self._pause_s = ROUND_S
        if is_master and reign > self._reign:
            self._do("reign", lambda: self._begin_reign(session, reign))
            if reign > self._reign:
                self._pause_s = REIGN_S
        # Before what takes longer: writers of a new master wait for it.
        if master is not None:
            self._do("guard", lambda: self._keep_guard(session, master, document, is_master=is_master))
        if is_master and len(document.members) > 1:
            self._do("sequence", lambda: self._publish_sequences(session))
        else:
            self._ceilings.forget()
        self._do("watch", session.keep_publication)
        self.alerts = [{"kind": kind, "text": duty.problem} for kind, duty in self._duties.items() if duty.problem]

    def _begin_reign(self, session: UpkeepSession, epoch: int) -> None:
        moved = session.begin_reign(epoch)
        log.info("action=reign-begun epoch=%d sequences=%s", epoch, moved)
        self._reign = epoch
        self._duties["guard"].due = 0.0

    def _keep_guard(
        self, session: UpkeepSession, master: Member, document: ClusterDocument, *, is_master: bool
    ) -> None:
        if not is_master:
            session.keep_guard(master)
            self._fence.stands(document.epoch, fenced=False)
            return
        # By the document of the epoch that the broker speaks of: one that was replaced in this very moment would open.
        fenced = self._fence.wanted(document.epoch)
        if fenced is None:
            return  # the broker says so within a second
        if not fenced and not self._may_open(document):
            self._pause_s = OPEN_S
            return
        settle = fenced and document.fence != "lease"
        session.keep_guard(master if fenced else None, fenced=fenced, settle=settle, reign=reign_began(document))
        self._fence.stands(document.epoch, fenced=fenced)

    def _publish_sequences(self, session: UpkeepSession) -> None:
        now = time.monotonic()
        if now >= self._next_repeat:
            self._next_repeat = now + REPEAT_S
            self._ceilings.repeat()
        session.publish_sequences(self._ceilings)

    def _do(self, kind: str, work: Callable[[], None]) -> None:
        """Do something when it is time to.

        Raises:
            UnreachableError: when the session is lost.
        """
        duty, now = self._duties[kind], time.monotonic()
        if now < duty.due:
            return
        try:
            work()
        except StepFailedError as error:
            if duty.problem != str(error):
                log.warning("action=upkeep kind=%s error=%s", kind, error)
            duty.problem = str(error)
            duty.due = time.monotonic() + duty.backoff.failed()
            return
        duty.problem = ""
        duty.backoff.succeeded()
        duty.due = now + duty.interval_s
