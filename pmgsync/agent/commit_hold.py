"""Synchronous mode in the agent: which commits capture may let return, and the thread that has the server wait for it.

Three say something: the broker, what slaves have; the cluster document, whether this node is the master; and the
server, whether it waits for capture at all. That it does is proved by a commit of this thread's own before a new
master opens its tables, and before anybody is told: until the server's checkpointer has followed the setting, commits
return without a slave. Commits of a master that was replaced must not be told to be done when they
are past the fork. So its sessions that still wait are ended before the server's setting is taken back.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing

from pmgsync.agent.fence import Fence
from pmgsync.core.backoff import Backoff
from pmgsync.core.forks import last_of_reign
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.positions import ZERO, Position
from pmgsync.core.synchronous import EVERYTHING
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.setup.standby_names import OURS, Names, StandbyNames, forget_names
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

LOOK_S = 0.5
PROVE_S = 0.05
"""So often it is tried whether commits wait, until they do."""
SLOW_S = 5.0
"""When the server takes longer than that, status says so."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0
CONFIRM_S = 1.0
"""So long a master that was replaced lets commits return that are before the fork."""
AWAIT_S = 0.5
POLL_S = 0.02
GUARD_S = 10.0
"""So long it waits for its guard: what is refused need not wait for slaves."""

Document = Callable[[], tuple[int, ClusterDocument] | None]


class CommitHold:
    """What capture's stream and the thread know of each other. For several threads.

    Attributes:
        alerts: what is wrong with the server's setting, for the worker's report; replaced as a whole.
    """

    def __init__(self, dsn: str, document: Document, fence: Fence) -> None:
        """Prepare.

        Args:
            document: returns this node's CID and the cluster document, None while they are not known.
            fence: tells when a master that was replaced refuses writes.
        """
        self.alerts: list[dict[str, str]] = []
        self._dsn = dsn
        self._document = document
        self._fence = fence
        self._changed = threading.Event()
        self._holds: tuple[int, bool] | None = None
        self._position = ZERO
        self._heard_at = time.monotonic()
        self._names: Names | None = None
        self._proving = self._proven = False
        self._unproven_since = 0.0
        self._replaced_at: float | None = None
        self._let_go_in = 0
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="synchronous", daemon=True)

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._thread.is_alive():
            self._thread.start()

    # -- for capture --------------------------------------------------------------------------------------------------

    def heard(self, message: Message) -> None:
        """Take over what the broker says."""
        holds, self._position = message.get("holds") is True, Position.parse(message.get("position"))
        self._heard_at = time.monotonic()
        self._set((int(message.get("epoch", 0)), holds))

    def _set(self, holds: tuple[int, bool]) -> None:
        if holds != self._holds:
            self._holds = holds
            self._changed.set()

    def _holds_in(self, document: ClusterDocument) -> bool:
        """Say whether commits are held in the document's epoch, as the broker said last; before, as the document."""
        holds = self._holds
        return holds[1] if holds is not None and holds[0] == document.epoch else document.synchronous

    @property
    def stands(self) -> bool:
        """True when the server lets commits wait for capture, or may."""
        # Asked many times for each transaction; not by a set, which hashes an Enum in Python.
        return self._names is not Names.NONE and self._names is not Names.OTHERS

    @property
    def proven(self) -> bool:
        """True when the server was seen to have commits wait for capture."""
        return self.stands and self._proven

    def position(self, incarnation: int) -> Position:
        """Return up to where commits may return, on an incarnation of the own chain; `EVERYTHING`: none is held."""
        known = self._document()
        if not self.stands or known is None:
            return EVERYTHING
        cid, document = known
        if document.master != cid:
            never = self._names is None and not document.synchronous_wanted.slaves
            if never or self._let_go_in == document.epoch:
                return EVERYTHING
            fork = last_of_reign(document.history, cid)
            return Position(fork.lsn) if fork is not None and fork.incarnation == incarnation else ZERO
        if not self._holds_in(document):
            return EVERYTHING
        if self._proving:  # confirmed at once, the commit that proves it could not be seen to wait
            return ZERO
        return self._position if self._holds is not None and self._holds[0] == document.epoch else ZERO

    def may_open(self, document: ClusterDocument) -> bool:
        """Say whether a new master may open its tables: the server has commits wait, when the document says so.

        When the server cannot be made to wait, status says so instead.
        """
        return not document.synchronous or self._proven or not self._holds_in(document) or self._gave_up(document)

    def await_opening(self, document: ClusterDocument) -> bool:
        """Wait a moment until `may_open`; False: not yet."""
        deadline = time.monotonic() + AWAIT_S
        while not self.may_open(document):
            if time.monotonic() > deadline:
                return False
            self._changed.set()
            time.sleep(POLL_S)
        return True

    def _gave_up(self, document: ClusterDocument) -> bool:
        """True when it is not waited for any longer that the server has commits wait."""
        if self._names in {Names.OURS, Names.BY_HAND}:
            patience_s = document.synchronous_wanted.patience_s
            return patience_s is not None and self._unproven_s() > patience_s
        return bool(self._problem)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._keep()
        except BaseException:
            # The supervisor starts the process anew; without this thread commits might wait for good.
            log.exception("action=synchronous-thread-died")
            os._exit(1)

    def _keep(self) -> None:
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            try:
                with closing(StandbyNames(self._dsn)) as session:
                    self._proven = False  # the server may be another one, or have been started again
                    while True:
                        proved = self._look(session)
                        backoff.succeeded()
                        self._changed.wait(LOOK_S if proved else PROVE_S)
                        self._changed.clear()
            except UnreachableError as error:
                if self._names is None or self._unproven_since:
                    self._note(str(error))  # nothing is confirmed before; else capture reports that the server is away
                log.info("action=synchronous-later error=%s", error)
            except PmgsyncError as error:
                self._note(str(error))
            time.sleep(backoff.failed())

    def _look(self, session: StandbyNames) -> bool:
        """Have the server's setting be as it should; False when commits do not wait yet, and should."""
        names = self._names = session.now()
        wanted = self._wanted()
        if wanted and names is Names.NONE:
            session.put()
            log.info("action=synchronous-names set=%s", OURS)
            names = session.now()
        elif wanted is False and names in {Names.OURS, Names.BY_HAND}:
            lets_go = self._let_go(session)
            if lets_go and names is Names.OURS:
                session.take_back()
                log.info("action=synchronous-names reset")
                names = session.now()
        if names is Names.NONE:
            self._proven = False
        self._names = names
        if not wanted or names is Names.OTHERS:
            self._unproven_since = 0.0
            self._note(self._problem_of(names) if wanted else "")
            return True
        proved = self._prove(session)
        self._note(self._problem_of(names))
        return proved

    def _prove(self, session: StandbyNames) -> bool:
        """See that the server has commits wait, unless it was seen before."""
        if self._proven:
            return True
        if not self._unproven_since:
            self._unproven_since = time.monotonic()
        self._proving = True
        try:
            self._proven = session.commits_wait()
        finally:
            self._proving = False
        if self._proven:
            log.info("action=synchronous-proven after_s=%.3f", self._unproven_s())
            self._unproven_since = 0.0
        return self._proven

    def _unproven_s(self) -> float:
        return time.monotonic() - self._unproven_since if self._unproven_since else 0.0

    def _wanted(self) -> bool | None:
        """Say whether the server is to wait for capture; None: as it is, for nothing is known yet."""
        known = self._document()
        if known is None:
            return None
        cid, document = known
        if document.master != cid:
            return False
        self._replaced_at = None
        patience_s = document.synchronous_wanted.patience_s
        silent_s = time.monotonic() - self._heard_at
        if patience_s is not None and silent_s > patience_s:
            if self._holds_in(document):
                log.warning("action=synchronous-degraded reason=nothing-heard-of-the-broker silent_s=%.0f", silent_s)
            self._holds = (document.epoch, False)
        return self._holds_in(document)

    def _let_go(self, session: StandbyNames) -> bool:
        """Let commits return that wait; False: not yet. On a master that was replaced: what is before the fork, then
        end the sessions that still wait.
        """
        known = self._document()
        if known is None or known[1].master == known[0] or known[1].epoch == self._let_go_in:
            return True
        cid, document = known
        if last_of_reign(document.history, cid) is None:  # nothing of its own is past a fork
            self._let_go_in = document.epoch
            return True
        now = time.monotonic()
        if self._replaced_at is None:
            self._replaced_at = now
        waited_s = now - self._replaced_at
        if waited_s < CONFIRM_S or (waited_s < GUARD_S and not self._fence.refuses(document.epoch)):
            return False
        if ended := session.break_waits():
            log.warning("action=synchronous-waits-ended sessions=%d reason=another-node-is-the-master", ended)
        self._let_go_in = document.epoch
        return True

    def _problem_of(self, names: Names) -> str:
        if names is Names.OTHERS:
            return (
                "commits do not wait for slaves: synchronous_standby_names has others' names; "
                f"add capture by hand, for example ANY 2 (…, {OURS.partition('(')[2]}"
            )
        if not self._proven and (since_s := self._unproven_s()) > SLOW_S:
            return (
                f"commits do not wait for slaves yet: for {since_s:.0f} s the server's checkpointer has not followed "
                "the change of synchronous_standby_names; a checkpoint that is under way delays that"
            )
        return ""

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            if problem:
                log.warning("action=synchronous-names error=%s", problem)
        self.alerts = [{"kind": "synchronous", "text": problem}] if problem else []


def let_go(dsn: str, document: ClusterDocument, cid: int) -> None:
    """See that commits do not wait for an agent that is being stopped, when they are not to wait without end."""
    if document.master != cid or not document.synchronous or document.synchronous_wanted.patience_s is None:
        return
    try:
        if forget_names(dsn, waits_return=True):
            log.warning("action=synchronous-degraded reason=the-agent-is-being-stopped")
    except PmgsyncError as error:
        log.warning("action=synchronous-names error=%s", error)
