"""The promotion of this node: one step after the other, the next one always by what is (`pmgsync.core.promotion`).

Nothing of it is kept. When this broker is killed, a promotion that had not begun its epoch is over, and can be asked
for again; one that had goes on by itself, for the rest follows from the document.

Before the votes this node stops taking more of the old master's chain, and waits until its database has applied all
that its journal has. There the new epoch leaves the chain. So nothing beyond that place can be applied by the history
that is held now. What comes meanwhile is fetched afterwards, and judged by the history of then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.chains.chains import Chains
from broker.leadership.asking import Answer
from broker.leadership.campaign import Campaign
from broker.leadership.handover import NEAR_BYTES
from broker.leadership.lease import LeaseKeeper
from broker.leadership.readiness import AskAgent, Readiness
from broker.leadership.survey import Survey
from broker.leadership.voter import Voter
from broker.members.calls import Attachments, End, Send
from pmgsync.core.document import ClusterDocument, Fork
from pmgsync.core.epochs import next_epoch
from pmgsync.core.lease import reign_began
from pmgsync.core.membership import new_epoch
from pmgsync.core.positions import format_lsn
from pmgsync.core.promotion import ChainPoint, Plan, Progress, Step, Way, next_step
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from, error_map

log = logging.getLogger(__name__)

PATIENCE_S = {
    Step.READY: 15.0,
    Step.CLOSE: 45.0,
    Step.FETCH: 30.0,
    Step.BEGIN: 15.0,
    Step.SEQUENCES: 60.0,
    Step.OPEN: 60.0,
    Step.SPREAD: 10.0,
}
"""For so long a step may bring nothing, in seconds."""
VOTES_S = 20.0
"""For so long after a whole lease votes are asked for."""
FIX_S = 15.0
HANDED_OVER = 0.6
"""The share of a lease in which a switchover must be through: a lease after it has closed the master takes up again."""
OTHERS_FIRST_S = 0.5
"""For so long the other members are asked before the old master: once it has voted it cannot go on."""


@dataclass(frozen=True)
class Surroundings:
    """What a promotion needs of the broker around it.

    Attributes:
        document: returns the document in force.
        begin_epoch: signs, stores and puts in force the first document of an epoch of this node.
        offer_document: takes a CID and the packed document that it offers.
        ask: sends a member a request, and the answer to a function; False when it is not connected.
        send: sends a member a message.
        ask_agent: has this node's agent answer a call; raises UnreachableError when it cannot.
    """

    document: Callable[[], ClusterDocument]
    begin_epoch: Callable[[ClusterDocument], object]
    offer_document: Callable[[int, bytes], None]
    ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool]
    send: Callable[[int, Mapping[str, Any], Sequence[bytes]], bool]
    ask_agent: AskAgent


@dataclass
class _Run:
    """One promotion that is under way.

    Attributes:
        before: the document in force when it began.
        master: CID of the master then.
        listeners: who is told, and under which request.
        step, since, moved: the step now, since when, and when it last brought something.
        ready: nothing stands in the way as far as this node's own database goes.
        asked_at, closed_at: when the master was asked to hand over, and had closed.
        goal: where the closed master's chain ends.
        applied: how far the old master's chain was applied here when it was held.
        fork, start: of the new epoch, when they are fixed.
    """

    plan: Plan
    before: ClusterDocument
    readiness: Readiness
    began: float
    listeners: list[tuple[Send, int]] = field(default_factory=list)
    step: Step | None = None
    since: float = 0.0
    moved: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    ready: bool = False
    asked_at: float | None = None
    closed_at: float | None = None
    failed: PmgsyncError | None = None
    goal: int | None = None
    seen: int = 0
    applied: ChainPoint | None = None
    fork: Fork | None = None
    start: Fork | None = None
    start_asked_at: float = 0.0
    campaign: Campaign | None = None
    campaigning: float = 0.0

    @property
    def master(self) -> int:
        return self.before.master


class Promotion:
    """Makes this node the master, when somebody asks for it."""

    def __init__(
        self,
        cid: int,
        voter: Voter,
        survey: Survey,
        lease: LeaseKeeper,
        chains: Chains,
        divergence: DivergenceFiles,
        around: Surroundings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cid = cid
        self._voter = voter
        self._survey = survey
        self._lease = lease
        self._chains = chains
        self._divergence = divergence
        self._around = around
        self._clock = clock
        self._run: _Run | None = None

    # -- who asks -----------------------------------------------------------------------------------------------------

    def begin(self, send: Send, request: int, *, force: bool) -> None:
        """Begin a promotion, or tell of the one that is under way.

        Args:
            send, request: get a message `step` for each step, and `done` or `error` at the end. When they are gone it
                goes on all the same.

        Raises:
            MembershipError: when this node cannot become master.
        """
        run = self._run
        if run is None:
            document, plan = self._around.document(), self._survey.plan(force=force)
            if plan.way is Way.IS_MASTER and not self._is_begun(document):
                plan = Plan(Way.FAILOVER, "the promotion of this node is not through yet")
            elif plan.way in {Way.IS_MASTER, Way.REFUSED}:
                raise MembershipError(plan.reason, hint=_REFUSED if plan.way is Way.REFUSED else "")
            readiness = Readiness(document.master, self._divergence, self._around.ask_agent)
            now = self._clock()
            run = self._run = _Run(plan, document, readiness, now)
            log.warning("action=promotion way=%s reason=%s", plan.way.name, plan.reason)
        elif run.steps:
            send({**run.steps[-1], "op": "step", "id": request}, ())
        run.listeners.append((send, request))
        self.tick()

    def _is_begun(self, document: ClusterDocument) -> bool:
        """Return False on a master whose reign has not come as far as to open."""
        reign = reign_began(document)
        return reign == 0 or (self._lease.reign >= reign and self._lease.is_open)

    def _tell(self, run: _Run, message: Mapping[str, Any]) -> None:
        run.listeners = [(send, request) for send, request in run.listeners if send({**message, "id": request}, ())]

    # -- time ---------------------------------------------------------------------------------------------------------

    def follow_document(self) -> None:
        """Take over that another document is in force."""
        if self._run is not None:
            self.tick()

    def tick(self) -> None:
        """Do what is to be done next, if a promotion is under way."""
        run = self._run
        if run is None:
            return
        try:
            while self._run is run and self._go_on(run):
                pass
        except PmgsyncError as error:
            self._give_up(run, error)

    def _go_on(self, run: _Run) -> bool:
        """Take the next step, or a part of it; True when another one is to be taken at once.

        Raises:
            PmgsyncError: when the promotion has failed.
        """
        if run.failed is not None:
            raise run.failed
        document = self._around.document()
        if document.history != run.before.history and document.master != self._cid:
            raise MembershipError(_replaced(document))
        step, now = next_step(self._progress(run, document)), self._clock()
        if step is not run.step:
            self._enter(run, step, now)
        patience = PATIENCE_S.get(step)
        late = patience is not None and now - run.moved > patience
        match step:
            case Step.READY:
                self._get_ready(run, late=late)
            case Step.CLOSE:
                self._ask_to_close(run, late=late)
            case Step.DRAIN | Step.FETCH:
                self._watch_fetch(run, step, late=late)
            case Step.WAIT | Step.VOTE:
                self._campaign(run, step)
            case Step.BEGIN:
                self._begin_epoch(run, late=late)
            case Step.SEQUENCES | Step.OPEN if late:
                raise UnreachableError(
                    f"this node is master of epoch {document.epoch}, but its tables are not open yet",
                    hint="it is done by itself; `pmgcm status` says what is in the way",
                )
            case Step.SPREAD if late:
                self._finish(run, document)
            case Step.DONE:
                self._finish(run, document)
            case _:
                pass
        return self._run is run and next_step(self._progress(run, self._around.document())) is not step

    def _enter(self, run: _Run, step: Step, now: float) -> None:
        run.step, run.since, run.moved = step, now, now
        told = {"step": step.name.lower(), "text": step.value, "seconds": round(now - run.began, 3)}
        run.steps.append(told)
        log.info("action=promotion-step step=%s seconds=%.3f", step.name, now - run.began)
        self._tell(run, {**told, "op": "step"})

    def _progress(self, run: _Run, document: ClusterDocument) -> Progress:
        have = self._survey.applied
        applied = have.complete_lsn if have is not None else 0
        goal = run.goal
        if document.master == self._cid:
            reign = reign_began(document)
            return Progress(
                is_master=True,
                way=run.plan.way,
                sequences_set=self._lease.reign >= reign,
                open=self._lease.is_open,
                spread=not self._not_reached(document),
            )
        if run.plan.way is not Way.SWITCHOVER and have is not None and run.applied is None:
            goal = self._survey.reachable(have).lsn
        if not run.ready:
            run.ready = self._is_ready(run)
        campaign = run.campaign
        wait_s = self._voter.bound_s(self._cid)
        if campaign is not None and run.plan.way is not Way.SWITCHOVER:
            wait_s = max(wait_s, campaign.wait_s(self._answering()))
        return Progress(
            is_master=False,
            way=run.plan.way,
            applied=applied,
            goal=goal,
            wait_s=wait_s,
            won=campaign is not None and campaign.won,
            ready=run.ready,
        )

    def _answering(self) -> set[int]:
        return {cid for cid, one in self._survey.others().items() if one.answers}

    def _not_reached(self, document: ClusterDocument) -> list[int]:
        """Return the members that do not hold this node's document yet, of those that answer."""
        seen = self._survey.others().values()
        return [
            one.cid
            for one in seen
            if one.answers and max(one.version, self._voter.holding.get(one.cid, (0, 0))) < document.version
        ]

    # -- before the epoch ---------------------------------------------------------------------------------------------

    def _is_ready(self, run: _Run) -> bool:
        return run.readiness.problem() is None and (run.plan.way is not Way.SWITCHOVER or self._behind() <= NEAR_BYTES)

    def _behind(self) -> int:
        """Return how many bytes of the master's chain are known and not applied here."""
        have, master = self._survey.applied, self._survey.others().get(self._around.document().master)
        head = master.journal if master is not None else None
        if have is None or head is None or head.incarnation != have.incarnation:
            return 1 << 62
        return max(0, head.complete_lsn - have.complete_lsn)

    def _get_ready(self, run: _Run, *, late: bool) -> None:
        if not late:
            return
        problem = run.readiness.problem()
        if problem is None:
            behind = self._behind()
            amount = f"{behind} bytes" if behind < 1 << 62 else "too far"
            problem = PmgsyncError(
                f"this node is {amount} behind the master", hint="`pmgcm wait` shows when it has caught up"
            )
        raise problem

    def _ask_to_close(self, run: _Run, *, late: bool) -> None:
        if late:
            raise UnreachableError("the master did not close its tables in time")
        if run.asked_at is not None:
            return
        run.asked_at = self._clock()

        def answered(message: Message, _: Sequence[bytes]) -> None:
            if self._run is not run:
                return
            if message["op"] == "error":
                run.failed = error_from(message)
            else:
                result = message["result"]
                run.closed_at, run.goal = self._clock(), int(result["lsn"])
                have = self._survey.applied
                if have is None or have.incarnation != result["incarnation"]:
                    run.failed = UnreachableError("the master has begun a new chain")
            self.tick()

        if not self._around.ask(run.master, {"op": "handover", "epoch": run.before.epoch}, answered, ()):
            raise UnreachableError("the master is not connected any more", hint="run `pmgcm promote` again")

    def _watch_fetch(self, run: _Run, step: Step, *, late: bool) -> None:
        have = self._survey.applied
        applied = have.complete_lsn if have is not None else 0
        if applied > run.seen:
            run.seen, run.moved = applied, self._clock()
        elif late:
            raise UnreachableError(
                f"nothing more of the master's chain was applied for {PATIENCE_S[Step.FETCH]:.0f} s",
                hint="`pmgcm status` says what is in the way",
            )
        if step is Step.DRAIN:
            self._refuse_late(run)

    def _refuse_late(self, run: _Run) -> None:
        """Give a switchover up in time: the master goes on after a lease."""
        if run.closed_at is not None and self._clock() - run.closed_at > HANDED_OVER * run.before.lease_ms / 1000:
            raise UnreachableError(
                "the switchover took too long, so the master goes on", hint="run `pmgcm promote` again"
            )

    def _is_fixed(self, run: _Run, *, late: bool) -> bool:
        """Fix where the new epoch leaves the old master's chain, and where this node's own is; True when that is done.

        Raises:
            PmgsyncError: when it takes too long.
        """
        self._chains.hold(run.master)
        have, head = self._survey.applied, self._chains.heads().get(run.master)
        if run.fork is None and have is not None:
            behind = head is not None and head.incarnation == have.incarnation and have.complete_lsn < head.complete.lsn
            if not behind:
                run.applied, run.fork = have, self._survey.fork(have)
        elif run.applied != have:
            run.fork = None  # something was copied meanwhile
        if run.start is None:
            self._find_start(run)
        if run.fork is not None and run.start is not None:
            return True
        if late:
            what = "its own chain" if run.fork is not None else "the master's chain"
            raise UnreachableError(f"this node's agent did not say in time how far {what} is")
        return False

    def _find_start(self, run: _Run) -> None:
        own, now = self._chains.own.chain, self._clock()
        if own is None or now - run.start_asked_at < 1.0:
            return
        run.start_asked_at = now

        def answered(message: Mapping[str, Any], _: Attachments) -> bool:
            if message["op"] == "done" and self._run is run:
                run.start = Fork(own.incarnation, int(message["result"]["lsn"]))
                self.tick()
            return True

        try:
            self._around.ask_agent(End("promotion start", answered, 0), "barrier", None)
        except UnreachableError as error:
            log.info("action=promotion-later error=%s", error)

    def _campaign(self, run: _Run, step: Step) -> None:
        """Ask for votes, or wait until that may have success."""
        self._refuse_late(run)
        now = self._clock()
        run.campaigning = run.campaigning or now
        if run.campaign is not None and now - run.campaigning > VOTES_S + run.before.lease_ms / 1000:
            reasons = [f"node {cid}: {reason}" for cid, reason in run.campaign.problems().items()]
            raise MembershipError(f"no majority has voted for this node ({'; '.join(reasons)})", hint=_REFUSED)
        if step is Step.WAIT or not self._is_fixed(run, late=now - run.moved > FIX_S):
            return
        if run.campaign is None:
            run.campaign = Campaign(
                self._cid,
                self._voter,
                ask=self._around.ask,
                offer_document=self._around.offer_document,
                heard_epoch=self._lease.heard_epoch,
                clock=self._clock,
            )
        run.campaign.tick(self._order(run))

    def _order(self, run: _Run) -> list[int]:
        """Return whom to ask for a vote now: the master last, for it cannot go on when it has voted."""
        voters = run.before.voters - {self._cid}
        answering = voters & self._answering()
        others = sorted(answering - {run.master})
        enough = run.before.is_majority({self._cid, *others})
        if run.master in answering and (not enough or self._clock() - run.since > OTHERS_FIRST_S):
            others.append(run.master)
        return others

    # -- the epoch ----------------------------------------------------------------------------------------------------

    def _begin_epoch(self, run: _Run, *, late: bool) -> None:
        self._refuse_late(run)
        if not self._is_fixed(run, late=late):
            return
        when, reason = time.time_ns() // 1000, _reason(run)
        if run.plan.way is Way.FORCED:
            held = self._around.document()
            epoch = next_epoch(held, self._voter.record, self._lease.heard_epoch)
            document = new_epoch(
                held, self._cid, epoch=epoch, fork=run.fork, start=run.start, when=when, reason=reason, forced=True
            )
        else:
            assert run.campaign is not None
            document = run.campaign.candidacy.document(fork=run.fork, start=run.start, when=when, reason=reason)
        log.warning("action=epoch-begins epoch=%d fork=%s start=%s", document.epoch, run.fork, run.start)
        self._around.begin_epoch(document)
        self._chains.release()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, run: _Run, document: ClusterDocument) -> None:
        self._run = None
        self._tell(run, {"op": "done", "result": self._result(run, document)})
        log.warning("action=promoted epoch=%d seconds=%.3f", document.epoch, self._clock() - run.began)

    def _result(self, run: _Run, document: ClusterDocument) -> dict[str, Any]:
        """Return the map of `pmgcm promote --json`; its contract is in README.md."""
        entry, loss = document.history[-1], None
        if run.fork is not None and run.plan.way is not Way.SWITCHOVER:
            upto = self._survey.newest(run.master, run.fork.incarnation)
            if upto > run.fork.lsn:
                loss = {
                    "after": format_lsn(run.fork.lsn),
                    "upto": format_lsn(upto),
                    "bytes": upto - run.fork.lsn,
                }
        answering = self._answering()
        return {
            "cluster": document.name,
            "epoch": document.epoch,
            "master": document.master,
            "before": run.master if run.master != self._cid else None,
            "way": run.plan.way.name.lower(),
            "votes": sorted(vote.cid for vote in entry.votes),
            "fork": None if entry.fork is None else format_lsn(entry.fork.lsn),
            "known_loss": loss,
            "not_reached": sorted(document.cids - {self._cid} - answering | set(self._not_reached(document))),
            "seconds": round(self._clock() - run.began, 3),
            "steps": [{"step": one["step"], "seconds": one["seconds"]} for one in run.steps],
        }

    def close(self) -> None:
        """End what is under way: this node leaves the cluster, or cannot put its document in force."""
        if self._run is not None:
            self._give_up(self._run, UnreachableError("this node's broker has left the cluster meanwhile"))

    def _give_up(self, run: _Run, error: PmgsyncError) -> None:
        self._run = None
        log.warning("action=promotion-failed error=%s", error)
        self._chains.release()
        if run.asked_at is not None and self._around.document().history == run.before.history:
            self._around.send(run.master, {"op": "handover.cancel"}, ())
        for send, request in run.listeners:
            send(error_map(request, error), ())


_REFUSED = "`pmgcm promote --dry-run` says who answers; --force does it without a majority"


def _replaced(document: ClusterDocument) -> str:
    master = document.member(document.master)
    name = master.name if master is not None else "another node"
    return f"{name} ({document.master}) was made master of epoch {document.epoch} meanwhile; this node follows it"


def _reason(run: _Run) -> str:
    member = run.before.member(run.master)
    name = f"{member.name} ({run.master})" if member is not None else f"node {run.master}"
    return {
        Way.SWITCHOVER: f"promoted; {name} handed over",
        Way.FORCED: f"promoted by force; {name} did not answer",
    }.get(run.plan.way, f"promoted; {name} did not answer")
