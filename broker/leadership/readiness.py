"""Whether this node could be master as far as it goes itself: its agent is asked again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from broker.leadership.handover import NEAR_BYTES
from broker.leadership.survey import Survey
from broker.leadership.voter import Voter
from broker.members.calls import Attachments, End
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from

AGAIN_S = 0.3
CREDIT = 1 << 20
FAR = 1 << 62
"""More bytes than any node is behind: it cannot be told."""
METHOD = "tables.incomplete"

AskAgent = Callable[[End, str, Message | None], None]
"""Has this node's agent answer a call; raises UnreachableError when it cannot."""

Trees = Callable[[], Iterable[Mapping[str, Any]]]
"""Returns what this node's agent says of its trees of files (PROTOCOL.md, section 6)."""


class Readiness:
    """What this node's agent says, its divergence files, and how far it is behind."""

    def __init__(
        self,
        cid: int,
        master: int,
        voter: Voter,
        survey: Survey,
        divergence: DivergenceFiles,
        ask_agent: AskAgent,
        trees: Trees,
    ) -> None:
        """Begin; `cid` is this node's."""
        self._cid = cid
        self._master = master
        self._voter = voter
        self._survey = survey
        self._trees = trees
        self._divergence = divergence
        self._ask_agent = ask_agent
        self._asked_at = 0.0
        self._tables: list[str] | None = None
        self._error: PmgsyncError | None = None

    def problem(self, *, master_answers: bool, forced: bool) -> PmgsyncError | None:
        """Return what stands against it now, None when nothing does. It may be over a moment later.

        Args:
            master_answers: then nothing of the master's may be missing here: it can still be had.
            forced: no votes are asked for; in a split others may hold a document that this node cannot take.
        """
        if not forced and (ahead := self._survey.ahead()):
            # Who has voted takes no other document of an earlier epoch any more: votes are asked for with the newest.
            return UnreachableError(f"node {ahead[0]} has a newer cluster document, which has not come here yet")
        if (problem := self._of_database()) is not None or not master_answers:
            return problem
        # The master's own spool stays its own: what is missing of it is fetched from it afterwards as before.
        if behind := [str(tree["tree"]) for tree in self._trees() if tree["of_master"] and tree["behind"]]:
            return UnreachableError(
                f"this node does not have all files yet that the master answers for ({', '.join(behind[:5])})",
                hint="`pmgcm files` shows them",
            )
        if (behind_bytes := self._behind()) > NEAR_BYTES:
            amount = f"{behind_bytes} bytes" if behind_bytes < FAR else "too far"
            return UnreachableError(
                f"this node is {amount} behind the master", hint="`pmgcm wait` shows when it has caught up"
            )
        if self._voter.promise.request is None and self._voter.bound_s(self._cid) > 0:
            # A promise that it must assume after a restart, the master cannot give back.
            return UnreachableError("this node was restarted, and has not acknowledged the master since")
        return None

    def _behind(self) -> int:
        """Return how many bytes of the master's chain are known and not applied here."""
        have, master = self._survey.applied, self._survey.others().get(self._master)
        head = master.journal if master is not None else None
        if have is None or head is None or head.incarnation != have.incarnation:
            return FAR
        return max(0, head.complete_lsn - have.complete_lsn)

    def _of_database(self) -> PmgsyncError | None:
        now = time.monotonic()
        if now - self._asked_at >= AGAIN_S:
            self._asked_at = now
            args = {"origin": self._master}
            message: Message = {"op": "call", "method": METHOD, "args": args, "credit": CREDIT}
            try:
                self._ask_agent(End("promotion", self._answered, 0), METHOD, message)
            except PmgsyncError as error:
                self._error = error
        if self._error is not None:
            return self._error
        if self._tables is None:
            return UnreachableError("this node's agent has not said yet how its tables are")
        if self._tables:
            return PmgsyncError(
                f"this node does not have all of {', '.join(self._tables[:5])}",
                hint="`pmgcm status` says why; promote another node, or wait until it is fetched",
            )
        if self._divergence.pending():
            return UnreachableError("this node still exports what it had of an earlier master")
        return None

    def _answered(self, message: Mapping[str, Any], _: Attachments) -> bool:
        if message["op"] == "error":
            self._error = error_from(dict(message))
        elif message["op"] == "done":
            self._error, self._tables = None, [str(name) for name in message["result"]["tables"]]
        return True
