"""Where a new epoch leaves the chain of the master before, and where this node's own chain is then.

This node takes no more of the chain from here on, and waits until its database has applied all that its journal has. So
nothing beyond the fork can be applied by the history that is held until the epoch begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.chains.chains import Chains
from broker.leadership.readiness import AskAgent
from broker.leadership.survey import Survey
from broker.members.calls import Attachments, End
from pmgsync.core.document import Fork
from pmgsync.core.promotion import ChainPoint
from pmgsync.errors import UnreachableError

log = logging.getLogger(__name__)

START_AGAIN_S = 1.0


class ForkPoint:
    """Fixes the two places; `Chains.release` ends the hold.

    Attributes:
        fork: on the master's chain; None: not known yet, or the master stays.
        start: on this node's own chain; likewise.
    """

    def __init__(
        self,
        cid: int,
        master: int,
        survey: Survey,
        chains: Chains,
        ask_agent: AskAgent,
        *,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            cid, master: this node, and the master before.
            changed: is called when the agent has answered.
        """
        self.fork: Fork | None = None
        self.start: Fork | None = None
        self._stays = cid == master
        self._master = master
        self._survey = survey
        self._chains = chains
        self._ask_agent = ask_agent
        self._changed = changed
        self._clock = clock
        self._applied: ChainPoint | None = None
        self._asked_at: float | None = None

    def fix(self, *, late: bool) -> bool:
        """Do what is left to do; True when both are known. A master that stays leaves nothing.

        Raises:
            UnreachableError: when it is late and they are not.
        """
        if self._stays:
            return True
        self._chains.hold(self._master)
        have, head = self._survey.applied, self._chains.heads().get(self._master)
        if self.fork is not None and self._applied != have:
            self.fork = None  # something was copied meanwhile
        if self.fork is None and have is not None:
            lacks = head is not None and head.incarnation == have.incarnation and have.complete_lsn < head.complete.lsn
            if not lacks:
                self._applied, self.fork = have, self._survey.fork(have)
        if self.start is None:
            self._find_start()
        if self.fork is not None and self.start is not None:
            return True
        if late:
            if self.fork is None:
                reason = "this node has not applied all that it has of the master's chain"
            else:
                reason = "this node's agent did not say in time where its own chain is"
            raise UnreachableError(reason, hint="`pmgcm status` says what is in the way")
        return False

    def _find_start(self) -> None:
        own, now = self._chains.own.chain, self._clock()
        if own is None or (self._asked_at is not None and now - self._asked_at < START_AGAIN_S):
            return
        self._asked_at = now

        def answered(message: Mapping[str, Any], _: Attachments) -> bool:
            if message["op"] == "done":
                self.start = Fork(own.incarnation, int(message["result"]["lsn"]))
                self._changed()
            return True

        try:
            self._ask_agent(End("promotion start", answered, 0), "barrier", None)
        except UnreachableError as error:
            log.info("action=promotion-later error=%s", error)
