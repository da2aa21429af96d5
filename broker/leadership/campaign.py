"""A campaign for votes: asks every member that has one, and votes for itself last (`pmgsync.core.epochs`)."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from broker.leadership.asking import Answer
from broker.leadership.voter import Voter
from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Candidacy, Refused, next_epoch
from pmgsync.core.votes import Vote
from pmgsync.errors import PmgsyncError
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

AGAIN_S = 0.05
"""Between two requests to a member that may vote in a moment."""
SILENT_S = 3.0
"""After so long without an answer a member is asked again."""
RIVAL_S = 0.6
"""Two candidates that have voted for each other begin again after different times, of at most so long."""


@dataclass(slots=True)
class _Asked:
    """What is known of one voter.

    Attributes:
        due: when it may be asked (again).
        free_at: when it may vote, as far as it has said.
        reason: why it has not voted.
    """

    due: float = -math.inf
    free_at: float = -math.inf
    reason: str = "has not answered"


def whom_to_ask(held: ClusterDocument, cid: int, answering: Collection[int], *, master_too: bool) -> list[int]:
    """Return the voters that node `cid` asks now, of those that answer.

    The master comes last, and only when there is no majority without it, or when the others have had time
    (`master_too`): once it has voted it cannot go on.
    """
    asked = (held.voters - {cid}) & set(answering)
    others = sorted(asked - {held.master})
    if held.master in asked and (master_too or not held.is_majority({cid, *others})):
        others.append(held.master)
    return others


class Campaign:
    """Asks for votes, in one epoch after the other, until a majority has voted in one.

    Attributes:
        candidacy: the one under way.
    """

    def __init__(
        self,
        cid: int,
        voter: Voter,
        *,
        ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool],
        offer_document: Callable[[int, bytes], None],
        heard_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            ask: sends a member a request, and the answer to a function; False when it is not connected.
            offer_document: takes a CID and the packed document that it offers; raises PmgsyncError when it is not
                acceptable.
            heard_epoch: the newest epoch that anybody has named.
        """
        self._cid = cid
        self._voter = voter
        self._ask = ask
        self._offer_document = offer_document
        self._heard = heard_epoch
        self._clock = clock
        self._voters: dict[int, _Asked] = {}
        self._paused_until = -math.inf
        self.candidacy = self._begin()

    def _begin(self) -> Candidacy:
        held = self._voter.held
        assert held is not None
        epoch = next_epoch(held.document, self._voter.record, self._heard)
        log.info("action=campaign epoch=%d", epoch)
        for asked in self._voters.values():
            asked.due = -math.inf
        return Candidacy.of(held, self._cid, epoch)

    @property
    def won(self) -> bool:
        """True when a majority has voted, and this node has neither taken another document nor voted again since."""
        held = self._voter.held
        return held is not None and self.candidacy.is_won(held, self._voter.record)

    def wait_s(self, answering: Collection[int]) -> float:
        """Return the seconds until enough of those who answer may vote, as far as they have said; 0.0: they may now."""
        now = self._clock()
        document = self.candidacy.held.document
        times = sorted(
            0.0 if cid in self.candidacy.votes else max(0.0, self._asked(cid).free_at - now)
            for cid in document.voters & {*answering, self._cid}
        )
        return times[document.majority - 1] if len(times) >= document.majority else 0.0

    def problems(self) -> dict[int, str]:
        """Return why members have not voted, by CID."""
        return {
            cid: self._asked(cid).reason
            for cid in sorted(self.candidacy.held.document.voters)
            if cid not in self.candidacy.votes and cid != self._cid
        }

    def tick(self, order: Sequence[int]) -> None:
        """Ask whom it is time to ask.

        Args:
            order: CIDs of those that are to be asked now.
        """
        now, held = self._clock(), self._voter.held
        assert held is not None
        if now < self._paused_until:
            return
        if self.candidacy.held.body != held.body or self.candidacy.ballot.epoch <= max(
            held.document.epoch, self._heard
        ):
            self.candidacy = self._begin()
        elif self._voter.record.epoch >= self.candidacy.ballot.epoch and self._voter.record.ballot != (
            self.candidacy.ballot
        ):
            # It has voted for another in this epoch meanwhile, whose document is to come now, or never.
            self._pause(now)
            return
        for cid in order:
            asked = self._asked(cid)
            if cid not in self.candidacy.votes and now >= asked.due:
                asked.due = now + SILENT_S
                message = {"op": "vote", "ballot": self.candidacy.ballot.to_map()}
                ballot = self.candidacy.ballot
                self._ask(cid, message, partial(self._answered, cid, ballot.epoch), (held.pack(),))
        if self.candidacy.lacks_own() and now >= self._asked(self._cid).due:
            self._vote_for_itself(now)

    def _pause(self, now: float) -> None:
        self._heard = max(self._heard, self._voter.record.epoch)
        self._paused_until = now + random.uniform(RIVAL_S / 4, RIVAL_S)  # noqa: S311 -- parts rivals, no secret

    def _asked(self, cid: int) -> _Asked:
        return self._voters.setdefault(cid, _Asked())

    def _answered(self, cid: int, epoch: int, message: Message, attachments: Sequence[bytes]) -> None:
        if epoch != self.candidacy.ballot.epoch:
            return
        asked, now = self._asked(cid), self._clock()
        if message["op"] == "done":
            result = message.get("result")
            vote = result.get("vote") if isinstance(result, dict) else None
            if isinstance(vote, dict):
                self.candidacy = self.candidacy.with_vote(Vote.from_map(vote))
            return
        told, wait_s = message.get("epoch"), message.get("wait_s")
        if message.get("message") != asked.reason:
            log.info("action=not-voted cid=%d reason=%s", cid, message.get("message"))
        asked.reason = str(message.get("message"))[:300]
        wait_s = float(wait_s) if isinstance(wait_s, int | float) and 0 <= wait_s < 1e6 else 0.0
        asked.free_at = now + wait_s
        asked.due = now + max(AGAIN_S, min(wait_s, 1.0))
        if message.get("documents_differ") is True and attachments:
            try:
                self._offer_document(cid, attachments[0])
            except PmgsyncError as error:
                log.warning("action=refused node=%d error=%s", cid, error)
        elif type(told) is int and self.candidacy.ballot.epoch <= told < 1 << 62:
            self._heard = max(self._heard, told)
            self._pause(now)

    def _vote_for_itself(self, now: float) -> None:
        answer = self._voter.vote(self.candidacy.ballot)
        if isinstance(answer, Refused):
            own = self._asked(self._cid)
            own.free_at, own.due, own.reason = now + answer.wait_s, now + AGAIN_S, answer.reason
        else:
            self.candidacy = self.candidacy.with_vote(answer)
