"""Promotions among nodes in one process: what is done when the other side behaves in every way that it can."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from broker.heartbeats.heartbeat import Applied
from pmgsync.core.document import Fork
from pmgsync.core.epochs import Refused
from pmgsync.core.positions import Position
from pmgsync.core.stretches import Stretch
from tests.harness.leading_nodes import LEASE_S, LIFE, LeadingNodes


@pytest.fixture
def nodes(tmp_path: Path) -> LeadingNodes:
    return LeadingNodes(tmp_path)


def test_the_master_hands_over(nodes: LeadingNodes) -> None:
    nodes.nodes[1].chains.journal[1] = 300
    asked = nodes.promote(2)
    nodes.until(lambda: asked.over)
    assert asked.result is not None, asked.error
    assert (asked.result["way"], asked.result["votes"], asked.result["not_reached"]) == ("switchover", [2, 3], [])
    assert [step for step in asked.steps if step not in {"drain", "wait", "ready"}][:3] == ["close", "vote", "begin"]
    entry = nodes.nodes[3].signed.document.history[-1]
    assert (entry.master, entry.fork, entry.start) == (2, Fork(LIFE, 300), Fork(LIFE, 110))
    assert nodes.masters() == {(2, 2)} and nodes.nodes[2].is_open
    assert not nodes.nodes[2].chains.held_back


def test_nobody_takes_over_and_the_master_goes_on(nodes: LeadingNodes) -> None:
    asked = nodes.promote(2)
    nodes.until(lambda: "close" in asked.steps)
    nodes.until(lambda: nodes.nodes[1].leading.lease.is_released)
    nodes.dead.add(2)
    nodes.until(lambda: nodes.nodes[1].is_open)
    assert nodes.masters() == {(1, 1)}


def test_a_candidate_that_gives_up_has_the_master_go_on_at_once(
    nodes: LeadingNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.dead.add(3)
    monkeypatch.setattr(nodes.nodes[1].voter, "vote", lambda _: Refused("it does not vote now", epoch=1))
    asked = nodes.promote(2)
    nodes.until(lambda: asked.over)
    assert "took too long" in asked.error and "it does not vote now" in asked.error
    assert not nodes.nodes[2].chains.held_back
    nodes.dead.clear()
    begun = time.monotonic()
    nodes.until(lambda: nodes.nodes[1].is_open)
    assert time.monotonic() - begun < LEASE_S / 2, "it does not wait for its own time to be over"


def test_a_master_that_dies_is_replaced_by_votes(nodes: LeadingNodes) -> None:
    nodes.dead.add(1)
    nodes.nodes[1].chains.journal[1] = 900
    nodes.nodes[3].chains.journal[1] = 500
    asked = nodes.promote(2)
    nodes.until(lambda: asked.over)
    assert asked.result is not None, asked.error
    assert (asked.result["way"], asked.result["votes"], asked.result["not_reached"]) == ("failover", [2, 3], [1])
    assert "wait" in asked.steps
    assert asked.result["known_loss"] == {"after": "0/1F4", "upto": "0/384", "bytes": 400}
    assert nodes.nodes[2].signed.document.history[-1].fork == Fork(LIFE, 500), "what the survivor had was fetched"
    nodes.dead.clear()
    nodes.until(lambda: nodes.masters() == {(2, 2)})


@pytest.mark.parametrize(("copied_at", "loss"), [(140, None), (160, {"after": "0/64", "upto": "0/A0", "bytes": 60})])
def test_where_a_copy_was_taken_nothing_need_have_been_published(
    nodes: LeadingNodes, copied_at: int, loss: object
) -> None:
    """The master's chain ends at 100, and it has told that nothing follows up to 150."""
    nodes.dead.add(1)
    nodes.nodes[3].chains.journal[1] = nodes.nodes[3].chains.first[1] = copied_at
    plan = nodes.nodes[2].leading.plan(force=False)
    assert (plan["way"], plan["fork"], plan["known_loss"]) == ("failover", "0/64", loss)


def test_whoever_stands_where_a_copy_was_taken_is_not_left_behind_a_fork(nodes: LeadingNodes) -> None:
    """The master's chain ends at 100 and nobody writes: no frame would lead node 3 from 120 to the new master's 140."""
    nodes.dead |= {1, 3}
    for cid, lsn in ((2, 140), (3, 120)):
        chains = nodes.nodes[cid].chains
        chains.journal[1] = chains.first[1] = lsn
        chains.applied[1] = Applied(LIFE, Position(lsn), Position(lsn))
    asked = nodes.promote(2, force=True)
    nodes.until(lambda: asked.over)
    assert asked.result is not None, asked.error
    assert (asked.result["way"], asked.result["fork"], asked.result["known_loss"]) == ("forced", "0/78", None)


def test_a_master_that_falls_silent_while_it_is_asked(nodes: LeadingNodes) -> None:
    nodes.nodes[1].agent_up = False  # so that it does not answer the handover at once
    asked, other = nodes.promote(2), nodes.promote(3, agreed=False)
    nodes.until(lambda: "close" in asked.steps and "close" in other.steps)
    nodes.dead.add(1)
    nodes.until(lambda: asked.over and other.over)
    assert "does not answer any more" in other.error, "nobody has agreed to lose something"
    assert asked.result is not None and asked.result["way"] == "failover", asked.error


def test_a_master_without_an_agent_says_so(nodes: LeadingNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.leadership.takeover.REFUSALS_S", 1.0)
    nodes.nodes[1].agent_up = False
    asked = nodes.promote(2)
    nodes.until(lambda: asked.over)
    assert "is not running" in asked.error
    assert nodes.masters() == {(1, 1)}


def test_without_a_majority_by_force(nodes: LeadingNodes) -> None:
    nodes.dead |= {1, 3}
    assert "1 of 3 members" in nodes.promote(2).error
    asked = nodes.promote(2, force=True)
    nodes.until(lambda: asked.over)
    assert asked.result is not None and asked.result["way"] == "forced", asked.error
    assert asked.steps[-1] == "done" and "wait" not in asked.steps
    nodes.dead.clear()
    nodes.until(lambda: nodes.masters() == {(2, 2)})


def test_by_force_when_the_majority_is_lost_meanwhile(nodes: LeadingNodes) -> None:
    nodes.dead.add(1)
    asked, refused = nodes.promote(2, force=True), nodes.promote(3)
    nodes.until(lambda: "wait" in asked.steps)
    assert not refused.error, "both could have been voted for"
    nodes.cut.add(frozenset((2, 3)))
    nodes.until(lambda: asked.over)
    assert asked.result is not None and asked.result["way"] == "forced", asked.error
    assert not refused.over, "it was not said that force is wanted"


def test_a_node_that_lacks_something_waits(nodes: LeadingNodes) -> None:
    nodes.nodes[2].incomplete = ["public.rule"]
    asked = nodes.promote(2)
    nodes.pass_time(0.5)
    assert asked.steps == ["ready"] and nodes.nodes[1].is_open
    nodes.nodes[2].incomplete = []
    nodes.until(lambda: asked.over)
    assert asked.result is not None


def test_a_node_that_lacks_files_waits_for_those_that_it_has_to_answer_for(nodes: LeadingNodes) -> None:
    configuration = {"tree": "/etc/pmg", "owner": 1, "of_master": True, "behind": 1}
    spool = {"tree": "/var/spool/pmg/cluster/1", "owner": 1, "of_master": False, "behind": 100_000}
    nodes.nodes[2].trees = [spool, configuration]
    asked = nodes.promote(2)
    nodes.pass_time(0.5)
    assert asked.steps == ["ready"] and nodes.nodes[1].is_open
    nodes.nodes[2].trees = [spool, {**configuration, "behind": 0}]
    nodes.until(lambda: asked.over)
    assert asked.result is not None, asked.error


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_two_at_once(tmp_path: Path, seed: int, alive: bool) -> None:
    nodes = LeadingNodes(tmp_path)
    if not alive:
        nodes.dead.add(1)
    first = nodes.promote(2)
    nodes.pass_time(random.Random(seed).uniform(0, 0.1))
    second = nodes.promote(3)
    nodes.until(lambda: first.over and second.over, within_s=30)
    won = [one for one in (first, second) if one.result is not None]
    assert won, (first.error, second.error)
    if len(won) == 1:
        lost = second if won[0] is first else first
        assert "was made master of epoch" in lost.error
    nodes.dead.clear()
    nodes.until(lambda: len(nodes.masters()) == 1)
    ((_, master),) = nodes.masters()
    nodes.until(lambda: nodes.nodes[master].is_open)


def test_a_vote_in_vain_is_made_good(nodes: LeadingNodes) -> None:
    nodes.nodes[1].leading.lease.release(lambda _: None)
    nodes.until(lambda: nodes.nodes[1].leading.lease.is_released)
    nodes.pass_time(0.1)
    nodes.nodes[1].voter.vote(nodes.first.ballot(2, 2))
    nodes.nodes[3].voter.vote(nodes.first.ballot(2, 2))
    nodes.until(lambda: nodes.masters() == {(3, 1)}, within_s=6 * LEASE_S + 10)
    nodes.until(lambda: nodes.nodes[1].is_open)
    assert nodes.nodes[3].signed.document.history[-1].fork is None


def test_two_members(tmp_path: Path) -> None:
    nodes = LeadingNodes(tmp_path, 2)
    asked = nodes.promote(2)
    nodes.until(lambda: asked.over)
    assert asked.result is not None, asked.error
    assert asked.result["votes"] == [1, 2]
    nodes.dead.add(2)
    assert "1 of 2 members" in nodes.promote(1).error


def test_what_is_known_to_be_empty_has_not_diverged(nodes: LeadingNodes) -> None:
    """The master's chain has nothing between its newest frame, at 100, and its watermark, 150."""
    node = nodes.nodes[2]
    stretch = Stretch(2, 2, 1, LIFE, 100)
    assert node.leading.trimmed(stretch, leads=False).after == 150
    assert node.leading.trimmed(replace(stretch, after=90), leads=False).after == 90, "a frame follows that"
    node.chains.applied[1] = Applied(LIFE, Position(140), Position(140))
    assert node.leading.trimmed(stretch, leads=True).upto is None, "the worker of the chain looks at its tables"
    node.chains.applied[1] = Applied(LIFE, Position(170), Position(170))
    kept = node.leading.trimmed(stretch, leads=True)
    assert (kept.after, kept.upto, kept.exported, kept.lost) == (150, 170, True, True), "the others fetch it"


class Story:
    """Promotions, deaths and cuts in any order; now and then all is well again, and then there is one master."""

    def __init__(self, nodes: LeadingNodes, seed: int) -> None:
        self.nodes = nodes
        self.random = random.Random(seed)
        self.told: list[str] = []
        self.promoted = 0

    def event(self) -> None:
        nodes, pick = self.nodes, self.random
        cid, other = pick.sample(list(nodes.cids), 2)
        match pick.choice(["promote", "promote", "promote", "die", "live", "cut", "heal"]):
            case "promote" if cid not in nodes.dead:
                error = nodes.promote(cid).error
                self.promoted += not error
                self.told.append(f"{cid} is promoted {error}")
            case "die" if not nodes.dead:
                nodes.dead.add(cid)
                self.told.append(f"{cid} dies")
            case "live":
                nodes.dead.clear()
                self.told.append("all live")
            case "cut":
                nodes.cut.add(frozenset((cid, other)))
                self.told.append(f"{cid} and {other} are cut")
            case "heal":
                nodes.cut.clear()
                self.told.append("all are connected")
        nodes.pass_time(pick.choice([0.02, 0.1, 0.5, 1.5]))

    def settle(self) -> None:
        self.nodes.dead.clear()
        self.nodes.cut.clear()
        self.told.append("all is well")
        self.nodes.until(self.is_settled, within_s=40)

    def is_settled(self) -> bool:
        return len(self.nodes.masters()) == 1 and any(node.is_open for node in self.nodes.nodes.values())


@pytest.mark.campaign
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_one_leads_in_the_end_and_never_two(tmp_path: Path, seed: int, count: int) -> None:
    story = Story(LeadingNodes(tmp_path, count), seed)
    try:
        for _ in range(6):
            for _ in range(story.random.randrange(3, 10)):
                story.event()
            story.settle()
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *story.told])) from error
    assert story.promoted > 0
