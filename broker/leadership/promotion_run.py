"""One promotion that is under way, what it needs around it, for how long it waits, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.leadership.asking import Answer
from broker.leadership.campaign import Campaign
from broker.leadership.fork_point import ForkPoint
from broker.leadership.readiness import AskAgent, Readiness, Trees
from broker.leadership.takeover import Takeover
from broker.members.calls import Send
from pmgsync.core.document import ClusterDocument
from pmgsync.core.positions import format_lsn
from pmgsync.core.promotion import Plan, Step, Way

log = logging.getLogger(__name__)

REFUSED = "`pmgcm promote --dry-run` says who answers; --force does it without a majority"

PATIENCE_S = {
    Step.READY: 20.0,
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
        trees: returns what this node's agent says of its trees of files.
    """

    document: Callable[[], ClusterDocument]
    begin_epoch: Callable[[ClusterDocument], object]
    offer_document: Callable[[int, bytes], None]
    ask: Callable[[int, Mapping[str, Any], Answer, Sequence[bytes]], bool]
    send: Callable[[int, Mapping[str, Any], Sequence[bytes]], bool]
    ask_agent: AskAgent
    trees: Trees


@dataclass
class Run:
    """One promotion that is under way.

    Attributes:
        force: a majority is not needed.
        agreed: whoever asked knows that something may be lost.
        renews: this node is the master, and is to be it in a later epoch.
        before: the document in force when it began.
        began: seconds of the clock.
        listeners: who is told, and under which request.
        step, since, moved: the step now, since when, and when it last brought something.
        ready: nothing stands in the way as far as this node's own database goes.
        reached: LSN up to which the old master's chain was applied here when it last moved.
        campaigning: since when votes are asked for, 0.0: not yet.
    """

    plan: Plan
    force: bool
    agreed: bool
    before: ClusterDocument
    readiness: Readiness
    takeover: Takeover
    place: ForkPoint
    began: float
    renews: bool = False
    listeners: list[tuple[Send, int]] = field(default_factory=list)
    step: Step | None = None
    since: float = 0.0
    moved: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    ready: bool = False
    reached: int = 0
    campaign: Campaign | None = None
    campaigning: float = 0.0

    @property
    def master(self) -> int:
        """CID of the master before."""
        return self.before.master

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tell whoever listens, and is still there."""
        self.listeners = [(send, request) for send, request in self.listeners if send({**message, "id": request}, ())]

    def enter(self, step: Step, now: float) -> None:
        """Take over that a step begins, and tell of it."""
        self.step, self.since, self.moved = step, now, now
        told = {"step": step.name.lower(), "text": step.value, "seconds": round(now - self.began, 3)}
        self.steps.append(told)
        log.info("action=promotion-step step=%s seconds=%.3f", step.name, now - self.began)
        self.tell({**told, "op": "step"})


def not_voted(campaign: Campaign) -> str:
    """Return why members have not voted."""
    return "; ".join(f"node {cid}: {reason}" for cid, reason in campaign.problems().items())


def replaced(document: ClusterDocument) -> str:
    """Return a sentence on who has become master instead."""
    master = document.member(document.master)
    name = master.name if master is not None else "another node"
    return f"{name} ({document.master}) was made master of epoch {document.epoch} meanwhile; this node follows it"


def reason_of(run: Run) -> str:
    """Return the reason that history gives for the new epoch."""
    if run.plan.way is not Way.SWITCHOVER and run.place.fork is None:
        return "voted for again, because members had voted in a later epoch in which nobody became master"
    member = run.before.member(run.master)
    name = f"{member.name} ({run.master})" if member is not None else f"node {run.master}"
    return {
        Way.SWITCHOVER: f"promoted; {name} handed over",
        Way.FORCED: f"promoted by force; {name} did not answer",
    }.get(run.plan.way, f"promoted; {name} did not answer")


def result_of(
    run: Run, document: ClusterDocument, *, published: int, not_reached: set[int], seconds: float
) -> dict[str, Any]:
    """Return the map of `pmgcm promote --json`; its contract is in README.md.

    Args:
        document: the one in force now.
        published: the LSN up to which the old master is known to have published.
        not_reached: CIDs of the members that do not know of the epoch.
    """
    entry, loss = document.history[-1], None
    fork = entry.fork
    if fork is not None and run.plan.way is not Way.SWITCHOVER and published > fork.lsn:
        loss = {"after": format_lsn(fork.lsn), "upto": format_lsn(published), "bytes": published - fork.lsn}
    return {
        "cluster": document.name,
        "epoch": document.epoch,
        "master": document.master,
        "before": run.master if run.master != document.master else None,
        "way": run.plan.way.name.lower(),
        "votes": sorted(vote.cid for vote in entry.votes),
        "fork": None if fork is None else format_lsn(fork.lsn),
        "known_loss": loss,
        "not_reached": sorted(not_reached),
        "seconds": round(seconds, 3),
        "steps": [{"step": one["step"], "seconds": one["seconds"]} for one in run.steps],
    }
