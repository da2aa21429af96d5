"""The promotion of this node: one step after the other, the next one always by what is (`pmgsync.core.promotion`).

Nothing of it is kept. When this broker is killed, a promotion that had not begun its epoch is over, and can be asked
for again; one that had goes on by itself, for the rest follows from the document.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from broker.chains.chains import Chains
from broker.leadership.campaign import Campaign, whom_to_ask
from broker.leadership.fork_point import ForkPoint
from broker.leadership.lease import LeaseKeeper
from broker.leadership.promotion_run import (
    PATIENCE_S,
    REFUSED,
    VOTES_S,
    Run,
    Surroundings,
    not_voted,
    reason_of,
    replaced,
    result_of,
)
from broker.leadership.readiness import Readiness
from broker.leadership.survey import Survey
from broker.leadership.takeover import Takeover
from broker.leadership.voter import Voter
from broker.members.calls import Send
from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import next_epoch
from pmgsync.core.lease import reign_began
from pmgsync.core.membership import new_epoch
from pmgsync.core.promotion import Plan, Progress, Step, Way, next_step
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import error_map

log = logging.getLogger(__name__)

FIX_S = 15.0
OTHERS_FIRST_S = 0.5
"""For so long the other members are asked before the old master."""


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
        self._run: Run | None = None
        self._busy = False

    # -- who asks -----------------------------------------------------------------------------------------------------

    def begin(self, send: Send, request: int, *, force: bool, agreed: bool) -> None:
        """Begin a promotion, or tell of the one that is under way.

        Args:
            force: do it without a majority.
            agreed: go on when the master does not answer (any more), though something may be lost.
            send, request: get a message `step` for each step, and `done` or `error` at the end. When they are gone it
                goes on all the same.

        Raises:
            MembershipError: when this node cannot become master.
        """
        run = self._run
        if run is None:
            document, plan = self._around.document(), self._survey.plan(force=force)
            if plan.way is Way.IS_MASTER and not self.is_through:
                plan = Plan(Way.FAILOVER, "the promotion of this node is not through yet")
            elif plan.way in {Way.IS_MASTER, Way.REFUSED}:
                raise MembershipError(plan.reason, hint=REFUSED if plan.way is Way.REFUSED else "")
            elif plan.way is not Way.SWITCHOVER and not agreed:
                raise UnreachableError("the master does not answer any more", hint="run `pmgcm promote` again")
            run = self._run = self._new_run(plan, document, force=force, agreed=agreed)
            log.warning("action=promotion way=%s reason=%s", plan.way.name, plan.reason)
        elif run.steps:
            send({**run.steps[-1], "op": "step", "id": request}, ())
        run.listeners.append((send, request))
        self.tick()

    def renew(self) -> None:
        """Begin a later epoch of this node, the master, for there are members that have voted in one."""
        document = self._around.document()
        plan = Plan(Way.FAILOVER, "a member has voted in a later epoch, in which nobody became master")
        log.warning("action=renewal reason=%s", plan.reason)
        self._run = self._new_run(plan, document, force=False, agreed=True)
        self._run.renews = self._run.ready = True
        self.tick()

    def _new_run(self, plan: Plan, document: ClusterDocument, *, force: bool, agreed: bool) -> Run:
        around, clock = self._around, self._clock
        readiness = Readiness(
            self._cid,
            document.master,
            self._voter,
            self._survey,
            self._divergence,
            around.ask_agent,
            around.trees,
        )
        takeover = self._new_takeover(document)
        place = ForkPoint(
            self._cid, document.master, self._survey, self._chains, around.ask_agent, changed=self.tick, clock=clock
        )
        return Run(plan, force, agreed, document, readiness, takeover, place, clock())

    def _new_takeover(self, document: ClusterDocument) -> Takeover:
        return Takeover(document, self._around.ask, self._around.send, changed=self.tick, clock=self._clock)

    @property
    def is_under_way(self) -> bool:
        """True while a promotion is."""
        return self._run is not None

    @property
    def is_through(self) -> bool:
        """False on a master that has become it and has not opened its tables yet."""
        reign = reign_began(self._around.document())
        return reign == 0 or (self._lease.reign >= reign and self._lease.is_open)

    # -- time ---------------------------------------------------------------------------------------------------------

    def follow_document(self) -> None:
        """Take over that another document is in force."""
        self.tick()

    def tick(self) -> None:
        """Do what is to be done next, if a promotion is under way."""
        run = self._run
        if run is None or self._busy:
            return
        self._busy = True
        try:
            while self._run is run and self._go_on(run):
                pass
        except PmgsyncError as error:
            if self._run is run:  # else it was ended when the document could not be put in force
                self._give_up(run, error)
        finally:
            self._busy = False

    def _go_on(self, run: Run) -> bool:
        """Take the next step, or a part of it; True when another one is to be taken at once.

        Raises:
            PmgsyncError: when the promotion has failed.
        """
        document = self._around.document()
        if document.history != run.before.history and document.master != self._cid:
            raise MembershipError(replaced(document))
        if document.history == run.before.history:
            if run.plan.way is Way.SWITCHOVER:
                self._look_after_master(run)
            elif run.plan.way is Way.FAILOVER and run.force and not (run.campaign and run.campaign.won):
                self._look_after_majority(run)
        step, now = next_step(self._progress(run, document)), self._clock()
        if step is not run.step:
            run.enter(step, now)
        patience = PATIENCE_S.get(step)
        late = patience is not None and now - run.moved > patience
        match step:
            case Step.READY if late:
                raise self._unready(run) or UnreachableError("this node was not ready in time")
            case Step.CLOSE if late:
                raise UnreachableError("the master did not close its tables in time")
            case Step.CLOSE:
                run.takeover.ask()
            case Step.DRAIN | Step.FETCH:
                self._watch_fetch(run, late=late)
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
        return self._run is run and next_step(self._progress(run, self._around.document())) is not step

    def _look_after_master(self, run: Run) -> None:
        """Go on without the master when it does not answer any more and has not closed yet.

        Raises:
            PmgsyncError: when it refuses, takes up again soon, or nobody has agreed to do without it.
        """
        takeover = run.takeover
        if takeover.goal is None and run.master not in self._answering():
            plan = self._survey.plan(force=run.force)
            if not run.agreed or plan.way not in {Way.FAILOVER, Way.FORCED}:
                raise takeover.failed or UnreachableError(
                    "the master does not answer any more", hint="run `pmgcm promote` again"
                )
            log.warning("action=promotion way=%s reason=%s", plan.way.name, plan.reason)
            takeover.cancel()
            run.plan, run.takeover = plan, self._new_takeover(run.before)
        elif takeover.failed is not None:
            raise takeover.failed
        elif takeover.goal is not None and (have := self._survey.applied) and have.incarnation != takeover.incarnation:
            raise UnreachableError("the master has begun a new chain", hint="run `pmgcm promote` again in a moment")
        elif takeover.late:
            reasons = f" ({not_voted(run.campaign)})" if run.campaign is not None else ""
            raise UnreachableError(
                f"the switchover took too long, so the master goes on{reasons}", hint="run `pmgcm promote` again"
            )

    def _look_after_majority(self, run: Run) -> None:
        """Go on by force, which was allowed, when no majority answers any more."""
        plan = self._survey.plan(force=True)
        if plan.way is Way.FORCED:
            log.warning("action=promotion way=%s reason=%s", plan.way.name, plan.reason)
            run.plan = plan

    def _progress(self, run: Run, document: ClusterDocument) -> Progress:
        have = self._survey.applied
        applied = have.complete_lsn if have is not None else 0
        goal = run.takeover.goal
        if self._leads(document) and not (run.renews and document.epoch == run.before.epoch):
            reign = reign_began(document)
            return Progress(
                is_master=True,
                way=run.plan.way,
                sequences_set=self._lease.reign >= reign,
                open=self._lease.is_open,
                spread=not self._not_reached(document),
            )
        if run.plan.way is not Way.SWITCHOVER and have is not None and run.place.fork is None:
            goal = self._survey.reachable(have).lsn
        if not run.ready:
            run.ready = self._unready(run) is None
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

    def _unready(self, run: Run) -> PmgsyncError | None:
        way = run.plan.way
        return run.readiness.problem(master_answers=way is Way.SWITCHOVER, forced=way is Way.FORCED)

    def _leads(self, document: ClusterDocument) -> bool:
        """True when this node is master, and has not voted for another since."""
        return document.master == self._cid and self._voter.may_lead

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

    def _watch_fetch(self, run: Run, *, late: bool) -> None:
        have = self._survey.applied
        applied = have.complete_lsn if have is not None else 0
        if applied > run.reached:
            run.reached, run.moved = applied, self._clock()
        elif late:
            raise UnreachableError(
                f"nothing more of the master's chain was applied for {PATIENCE_S[Step.FETCH]:.0f} s",
                hint="`pmgcm status` says what is in the way",
            )

    def _campaign(self, run: Run, step: Step) -> None:
        """Ask for votes, or wait until that may have success."""
        now = self._clock()
        run.campaigning = run.campaigning or now
        if run.campaign is not None and now - run.campaigning > VOTES_S + run.before.lease_ms / 1000:
            raise MembershipError(f"no majority has voted for this node ({not_voted(run.campaign)})", hint=REFUSED)
        if step is Step.WAIT or not run.place.fix(late=now - run.moved > FIX_S):
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
        hurried = now - run.since > OTHERS_FIRST_S
        run.campaign.tick(whom_to_ask(run.before, self._cid, self._answering(), master_too=hurried))

    # -- the epoch ----------------------------------------------------------------------------------------------------

    def _begin_epoch(self, run: Run, *, late: bool) -> None:
        if not run.place.fix(late=late):
            return
        fork, start = run.place.fork, run.place.start
        when, reason = time.time_ns() // 1000, reason_of(run)
        if run.plan.way is Way.FORCED:
            held = self._around.document()
            epoch = next_epoch(held, self._voter.record, self._lease.heard_epoch)
            document = new_epoch(
                held, self._cid, epoch=epoch, fork=fork, start=start, when=when, reason=reason, forced=True
            )
        else:
            assert run.campaign is not None
            document = run.campaign.candidacy.document(fork=fork, start=start, when=when, reason=reason)
        log.warning("action=epoch-begins epoch=%d fork=%s start=%s", document.epoch, fork, start)
        self._around.begin_epoch(document)
        self._chains.release()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, run: Run, document: ClusterDocument) -> None:
        self._run = None
        seconds, fork = self._clock() - run.began, run.place.fork
        result = result_of(
            run,
            document,
            published=self._survey.published(run.master, fork) if fork is not None else 0,
            not_reached=set(document.cids - {self._cid} - self._answering()) | set(self._not_reached(document)),
            seconds=seconds,
        )
        run.tell({"op": "done", "result": result})
        log.warning("action=promoted epoch=%d seconds=%.3f", document.epoch, seconds)

    def close(self) -> None:
        """End what is under way: this node leaves the cluster, or cannot put its document in force."""
        run = self._run
        if run is not None:
            run.takeover.cancel()
            self._end(run, UnreachableError("this node's broker has left the cluster meanwhile"))

    def _give_up(self, run: Run, error: PmgsyncError) -> None:
        if self._around.document().history == run.before.history:
            run.takeover.cancel()
        self._chains.release()
        self._end(run, error)

    def _end(self, run: Run, error: PmgsyncError) -> None:
        self._run = None
        log.warning("action=promotion-failed error=%s", error)
        for send, request in run.listeners:
            send(error_map(request, error), ())
