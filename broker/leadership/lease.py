"""The master's lease: it asks for acknowledgements, tells the database how long it may write, and lets go for another.

The rules are `pmgsync.core.lease`. Requests go out every tenth of a lease, at least each second, also while the cluster
is not fenced: the fence can come in force at once then, and the acknowledgements say which document members hold.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from broker.leadership.asking import Answer
from broker.leadership.told_deadline import ToldDeadline
from broker.leadership.voter import Voter
from broker.members.calls import Attachments, End
from pmgsync.core.lease import fence_due, is_kept
from pmgsync.core.membership import ClusterDocument, SignedDocument, with_fence
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from

log = logging.getLogger(__name__)

ASK_S = 1.0
"""The longest time between two requests; a tenth of the lease when that is less."""
FENCE_S = 30.0
"""For so long a handover waits until the triggers stand on a master that was not fenced."""
AGENT_S = 3.0
"""For so long a handover waits for an agent that does not take what it is told."""
KEPT_S = 6.0
"""For so long somebody waits until a majority holds the document, before he is told to come again."""

Done = Callable[[PmgsyncError | None], None]
"""Called once: without an error, it is done."""


@dataclass(frozen=True)
class Surroundings:
    """What the lease needs of the broker around it.

    Attributes:
        document: returns the document in force.
        change_document: signs, stores and puts in force a new one.
        offer_document: takes a CID and the packed document that it offers.
        ask: sends a member a request, and the answer to a function.
        send: sends a member a message; one that is not connected does not get it.
        refused: has status show why something that a member sent was refused.
        tell_agent: sends the lease worker a message; False when there is none.
        ask_agent: has this node's agent answer a call; raises UnreachableError when it cannot.
    """

    document: Callable[[], SignedDocument]
    change_document: Callable[[ClusterDocument], object]
    offer_document: Callable[[int, bytes], None]
    ask: Callable[[int, Mapping[str, Any], Answer], bool]
    send: Callable[[int, Mapping[str, Any], Sequence[bytes]], bool]
    refused: Callable[[int, PmgsyncError], None]
    tell_agent: Callable[[Message], bool]
    ask_agent: Callable[[End, str], None]


@dataclass
class _Release:
    """A handover that is under way: first the fence stands, then the database is shut."""

    done: Done
    deadline: float
    shutting: bool = False


class LeaseKeeper:
    """Keeps the lease of this node while it is the master, and its database closed while it is not.

    Attributes:
        heard_epoch: the newest epoch that a refusal has named: a candidate must go beyond it.
        beyond: members that have named a later epoch than this master's: CID → since when.
    """

    def __init__(
        self,
        cid: int,
        voter: Voter,
        around: Surroundings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.heard_epoch = 0
        self.beyond: dict[int, float] = {}
        self._cid = cid
        self._voter = voter
        self._around = around
        self._clock = clock
        self._run = secrets.randbits(62)
        self._number = 0
        self._ask_at = -math.inf
        self._database = ToldDeadline(around.tell_agent)
        self._fence_due = False
        self._release: _Release | None = None
        self._released_at = math.inf
        self._waiting: list[tuple[float, Done]] = []

    # -- time and documents -------------------------------------------------------------------------------------------

    def follow_document(self) -> None:
        """Bring everything in line with the document in force: at once."""
        self.beyond.clear()
        if self._leads:
            self._spread()
        else:
            self._end_release(MembershipError("this node is not the master any more"))
            self._fence_due, self._released_at = False, math.inf
        self._ask_at = -math.inf
        self._database.again()
        self.tick()

    def tick(self) -> None:
        """Do what is due."""
        now = self._clock()
        if self._leads:
            self._ask(now)
            self._go_on_releasing(now)
            if self._voter.lease.closing and now - self._released_at > self._document.lease_ms / 1000:
                log.warning("action=lease-taken-up reason=nobody-took-over")
                self.take_up()
            self._keep_fence()
        self._tell(now)
        self._answer_waiting(now)

    @property
    def _document(self) -> ClusterDocument:
        return self._around.document().document

    @property
    def _leads(self) -> bool:
        return self._voter.may_lead

    # -- requests and acknowledgements --------------------------------------------------------------------------------

    def _spread(self) -> None:
        """Send the document on the connections that requests go by: so the next acknowledgements are of it."""
        document, packed = self._document, self._around.document().pack()
        for cid in document.cids - {self._cid}:
            self._around.send(cid, {"op": "offer"}, (packed,))

    def _ask(self, now: float) -> None:
        document = self._document
        others = document.voters - {self._cid}
        if now < self._ask_at or not others or self._voter.lease.closing or self._shutting:
            return
        self._ask_at = now + min(ASK_S, document.lease_ms / 10_000)
        try:
            wait_s = self._voter.begin_asking()
        except PmgsyncError as error:
            log.error("action=lease-not-asked error=%s", error)  # status shows it as the voter's problem
            return
        if wait_s > 0:
            self._ask_at = now + min(wait_s, ASK_S)
            return
        self._number += 1
        message = {"op": "lease", "epoch": document.epoch, "run": self._run, "number": self._number}
        for cid in others:
            self._around.ask(cid, message, partial(self._answered, cid, document.epoch, now))

    def _answered(self, cid: int, epoch: int, sent: float, message: Message, attachments: Sequence[bytes]) -> None:
        if message["op"] != "done":
            self._was_refused(cid, message, attachments)
            return
        voter, result = self._voter, message.get("result")
        if epoch != voter.lease.epoch or not self._leads or not isinstance(result, dict):
            return
        voter.lease = voter.lease.acknowledged(cid, sent)
        self.beyond.pop(cid, None)
        version = (result.get("epoch"), result.get("serial"))
        if version[0] == epoch and type(version[1]) is int:
            voter.holding[cid] = max((epoch, version[1]), voter.holding.get(cid, (0, 0)))
        now = self._clock()
        self._tell(now)
        self._answer_waiting(now)

    def _was_refused(self, cid: int, message: Message, attachments: Sequence[bytes]) -> None:
        epoch = message.get("epoch")
        if type(epoch) is int and 0 < epoch < 2**62:
            self.heard_epoch = max(self.heard_epoch, epoch)
            if epoch > self._document.epoch:
                self.beyond.setdefault(cid, self._clock())
        if not attachments:
            return
        try:
            self._around.offer_document(cid, attachments[0])
        except PmgsyncError as error:
            self._around.refused(cid, error)

    def when_kept(self, done: Done) -> None:
        """Call `done` when no vote can lose the document in force any more, or with an error when that takes long."""
        self._waiting.append((self._clock() + KEPT_S, done))
        self._ask_at = -math.inf
        self.tick()

    def _answer_waiting(self, now: float) -> None:
        waiting, self._waiting = self._waiting, []
        for deadline, done in waiting:
            # Each may change the document: the next one waits for that.
            if self._leads and is_kept(self._document, self._voter.holding):
                done(None)
            elif now > deadline or not self._leads:
                done(
                    UnreachableError(
                        "a majority of the members does not answer the master, so it cannot change the cluster",
                        hint="see `pmgcm status` on the master",
                    )
                )
            else:
                self._waiting.append((deadline, done))

    # -- the database -------------------------------------------------------------------------------------------------

    @property
    def _shutting(self) -> bool:
        return self._release is not None and self._release.shutting

    def _deadline(self) -> tuple[float, bool]:
        """Return until when the database may be written, 0.0 for not at all, and whether it is fenced."""
        document, voter = self._document, self._voter
        if document.master != self._cid:
            return 0.0, False
        fenced = document.fence == "lease" or self._fence_due or voter.has_voted_away
        if voter.has_voted_away:
            return 0.0, True
        if not self._leads:
            # What it has voted cannot be told: fenced it cannot ask for a lease; without a fence nothing is at stake.
            return (0.0, True) if fenced else (math.inf, False)
        return max(0.0, voter.lease.until(document)), fenced

    def _tell(self, now: float) -> None:
        if not self._shutting:
            until, fenced = self._deadline()
            if self._database.tell(now, self._document.epoch, until, fenced=fenced):
                self._note_told()

    @property
    def reign(self) -> int:
        """The newest epoch for which this node's sequences were passed, as far as its agent has said."""
        return self._database.reign

    @property
    def is_released(self) -> bool:
        """True while this node, the master, has let go for another."""
        return self._leads and self._voter.lease.closing

    @property
    def is_open(self) -> bool:
        """True while the database of this node, the master, takes writes, as its agent has confirmed."""
        return self._leads and self._database.opened_until > self._clock()

    def _note_told(self) -> None:
        """Have the lease know the latest deadline that the database may go by."""
        if self._leads:
            self._voter.lease = self._voter.lease.tell(self._database.latest)

    def agent_told(self, number: int, *, guarded: bool, opened: bool = False, reign: int = 0) -> None:
        """Take over that the agent has written a deadline; the arguments are those of `ToldDeadline.confirmed`."""
        until = self._database.confirmed(number, guarded=guarded, opened=opened, reign=reign)
        if until is None:
            return
        self._note_told()
        if self._document.master != self._cid and until == 0.0 and guarded:
            self._voter.closed()

    # -- the fence ----------------------------------------------------------------------------------------------------

    def _keep_fence(self) -> None:
        """Have the document say that the master is fenced, or not, as it should be.

        First the triggers stand, then the document says so: from then on others go by it.
        """
        document = self._document
        if self._release is not None or self._voter.lease.closing:
            return
        due = fence_due(document, document.fence_wanted, self._voter.holding)
        self._fence_due = due == "lease"
        if due is None or (due == "lease" and self._database.guarded != (True, True)):
            return
        log.info("action=fence fence=%s voters=%d", due, len(document.voters))
        self._fence_due = False
        try:
            self._around.change_document(with_fence(document, due))
        except PmgsyncError as error:
            log.error("action=fence-not-changed error=%s", error)

    # -- handing over -------------------------------------------------------------------------------------------------

    def release(self, done: Done) -> None:
        """Close the database for another master, then let the lease go and tell the others.

        `done` is called without an error when the database has confirmed that it is closed: whatever was committed is
        before what `barrier` answers from then on. With an error the master goes on as before.
        """
        if not self._leads or self._release is not None:
            done(MembershipError("this node is not the master, or hands over already"))
            return
        if self._voter.lease.closing:
            self._released_at = self._clock()
            done(None)
            return
        self._fence_due = True
        self._release = _Release(done, self._clock() + FENCE_S)
        self.tick()

    def take_up(self) -> None:
        """Go on as master after all: nobody took over."""
        if self._leads and self._voter.lease.closing:
            self._voter.lease = self._voter.lease.taken_up(self._clock())
            self._fence_due, self._released_at = False, math.inf
            self._ask_at = -math.inf
            self.tick()

    def _go_on_releasing(self, now: float) -> None:
        release = self._release
        if release is None or release.shutting:
            return
        if self._database.guarded is None and now > release.deadline - FENCE_S + AGENT_S:
            self._end_release(UnreachableError("the agent of the master is not running"))
            return
        if self._database.guarded != (True, True):
            if now > release.deadline:
                self._end_release(
                    UnreachableError(
                        f"the tables could not be made ready for closing within {FENCE_S:.0f} s",
                        hint="`pmgcm status` says which transactions are in the way",
                    )
                )
            return
        release.shutting = True
        try:
            self._around.ask_agent(End("lease", self._was_shut, 0), "lease.shut")
        except PmgsyncError as error:
            self._end_release(error)

    def _was_shut(self, message: Mapping[str, Any], _: Attachments) -> bool:
        if self._release is None or not self._release.shutting:
            return True
        if message["op"] == "error":
            self._end_release(error_from(message))
        elif message["op"] == "done":
            result = message.get("result")
            if not isinstance(result, dict) or result.get("closed") is not True:
                self._end_release(UnreachableError("a transaction that was about to commit did not end in time"))
            elif self._leads:
                self._let_go()
        return True

    def _let_go(self) -> None:
        self._database.forget()
        self._voter.lease = self._voter.lease.released()
        self._voter.closed()
        self._released_at = self._clock()
        log.info("action=lease-released")
        for cid in self._document.cids - {self._cid}:
            self._around.send(cid, {"op": "lease.release", "run": self._run, "number": self._number}, ())
        self._end_release(None)

    def _end_release(self, error: PmgsyncError | None) -> None:
        release, self._release = self._release, None
        if release is None:
            return
        if error is not None:
            self._fence_due = False
        release.done(error)

    # -- status -------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the map `lease` of `pmgcm status --json`; its contract is in README.md."""
        document, voter, now = self._document, self._voter, self._clock()
        found: dict[str, Any] = {
            "fence": document.fence,
            "wanted": document.fence_wanted,
            "lease_s": document.lease_ms / 1000,
            "voters": len(document.voters),
            "majority": document.majority,
            "is_master": document.master == self._cid,
            "promised_to": voter.promise.master or None,
            "promised_s": max(0.0, round(voter.promise.until - now, 3)) if voter.promise.master else 0.0,
            "handing_over": False,
            "has_voted_away": False,
        }
        if document.master != self._cid:
            return found
        until, fenced = self._deadline()
        missing = voter.lease.missing(document, now)
        return found | {
            "left_s": None if math.isinf(until) else max(0.0, round(until - now, 3)),
            "open": until > now,
            "acknowledged": sorted(document.voters - missing),
            "missing": sorted(missing),
            "handing_over": voter.lease.closing or self._release is not None,
            "guarded": self._database.guarded == (fenced, True),
            "has_voted_away": voter.has_voted_away,
        }
