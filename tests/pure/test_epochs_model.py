"""Votes, leases and documents under partitions, crashes, pauses and a bad network: never two masters, nothing lost."""

# Longer than a module should be: one state machine.
from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pmgsync.errors import MembershipError
from tests.harness.epoch_observer import Violation
from tests.harness.epoch_world import World

RATES = [0.96, 1.0, 1.04]
"""Clocks that differ by more than any real ones, and by less than the lease's margin."""
SHAPES = [(2, 0), (3, 0), (3, 1), (5, 0), (5, 1)]
"""Members that have a vote, and how many of them are witnesses."""

cids = st.integers(1, 9)
numbers = st.integers(0, 1000)


class Epochs(RuleBasedStateMachine):
    """Any order of anything that can happen."""

    @initialize(shape=st.sampled_from(SHAPES), data=st.data())
    def found(self, shape: tuple[int, int], data: st.DataObject) -> None:
        self.world = World(shape[0], witnesses=shape[1])
        for cid in self.world.nodes:
            self.world.set_clock(cid, data.draw(st.sampled_from(RATES)), data.draw(st.integers(-900, 900)))

    def node(self, cid: int) -> int:
        known = sorted(self.world.nodes)
        return known[cid % len(known)]

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0, 9.0, 11.0, 60.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(number=numbers, keep=st.booleans(), crash=st.sampled_from([False] * 9 + [True]))
    def deliver(self, number: int, keep: bool, crash: bool) -> None:
        if self.world.network:
            self.world.deliver(number % len(self.world.network), keep=keep, crash=crash)

    @rule(count=st.integers(1, 30))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.world.network))):
            self.world.deliver(0)

    @rule(number=numbers)
    def lose(self, number: int) -> None:
        if self.world.network:
            self.world.lose(number % len(self.world.network))

    @rule(one=cids, other=cids)
    def cut(self, one: int, other: int) -> None:
        self.world.cut ^= {frozenset((self.node(one), self.node(other)))}

    @rule()
    def heal(self) -> None:
        self.world.cut.clear()

    @rule(cid=cids, machine=st.booleans())
    def crash(self, cid: int, machine: bool) -> None:
        self.world.crash(self.node(cid), machine=machine)

    @rule(cid=cids)
    def restart(self, cid: int) -> None:
        self.world.restart(self.node(cid))

    @rule(cid=cids)
    def request(self, cid: int) -> None:
        self.world.request(self.node(cid))

    @rule()
    def masters_request(self) -> None:
        for cid in list(self.world.nodes):
            self.world.request(cid)

    @rule(cid=cids)
    def stand(self, cid: int) -> None:
        self.world.stand(self.node(cid))

    @rule(cid=cids, what=st.sampled_from(["hand_over", "take_up", "close", "spread", "force"]))
    def act(self, cid: int, what: str) -> None:
        getattr(self.world, what)(self.node(cid))

    @rule(cid=cids, what=st.sampled_from(["touch", "join", "confirm", "delete", "fence"]), which=numbers)
    def change(self, cid: int, what: str, which: int) -> None:
        self.world.change(self.node(cid), what, which)


Epochs.TestCase.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEpochs = Epochs.TestCase


def run(seed: int, steps: int = 150, faults: frozenset[str] = frozenset(), *, forced: bool = True) -> World:
    """Run a world through an ordinary bad day: masters ask, messages come late or not at all, somebody stands."""
    chance = random.Random(seed)
    voters, witnesses = chance.choice(SHAPES)
    world = World(voters, witnesses=witnesses, faults=faults)
    for cid in world.nodes:
        world.set_clock(cid, chance.choice(RATES), chance.uniform(-900, 900))
    patience = chance.choice([0.0, 0.2, 0.5])
    kinds = ["tick", "stand", "cut", "crash", "restart", "change", "hand over", "close", "force"]
    weights = [50, 12, 5, 2, 5, 6, 2, 4, 1 if forced else 0]
    for kind in chance.choices(kinds, weights, k=steps):
        some = chance.choice(sorted(world.nodes))
        masters = [cid for cid, node in world.nodes.items() if world.is_master(node)]
        match kind:
            case "tick":
                for cid in masters:
                    world.request(cid)
                world.pass_time(chance.choice([0.0, 0.1, 0.5, 1.0]))
            case "stand":
                world.stand(some)
            case "cut" if chance.random() < 0.4:
                world.cut.clear()
            case "cut":
                here = {cid for cid in world.nodes if chance.random() < 0.4}
                world.cut = {frozenset((one, two)) for one in here for two in world.nodes.keys() - here}
            case "crash":
                world.crash(some, machine=chance.random() < 0.5)
            case "restart":
                for cid in sorted(world.nodes):
                    world.restart(cid)
            case "change":
                what = chance.choice(["touch", "join", "confirm", "delete", "fence"])
                world.change(chance.choice(masters or [some]), what, chance.randrange(9))
            case "hand over":
                chance.choice([world.hand_over, world.take_up])(chance.choice(masters or [some]))
            case "close":
                chance.choice([world.close, world.spread])(some)
            case "force":
                world.force(some)
        jitter(world, chance, patience)
        world.pass_time(chance.choice([0.0, 0.1, 0.5, 1.0, 1.0, 4.0, 9.5]))
    return world


def jitter(world: World, chance: random.Random, patience: float) -> None:
    """Deliver what is on its way, in three rounds: some of it late, twice, out of order, or never."""
    for _ in range(3):
        number = 0
        for _ in range(len(world.network)):
            lot = chance.random()
            if lot < patience:
                number += 1
            elif lot > 0.97:
                world.lose(number)
            else:
                world.deliver(number, keep=chance.random() < 0.05, crash=chance.random() < 0.005)


@pytest.mark.parametrize("seed", range(40))
def test_bad_days(seed: int) -> None:
    run(seed)


def test_one_more_voter_does_not_make_a_master_forget_how_long_it_writes() -> None:
    run(1145, 250)


@pytest.mark.parametrize("seed", range(20))
def test_after_a_bad_day_one_is_master_again(seed: int) -> None:
    world = run(seed, forced=False)
    world.cut.clear()
    for cid in world.nodes:
        world.restart(cid)
        world.take_up(cid)
    for cid in sorted(world.nodes) * 3:
        world.pass_time(11)
        for one in world.nodes:
            world.close(one)
            world.spread(one)
        world.settle()
        world.stand(cid)
        world.settle()
        for one in world.nodes:
            world.beat(one)
    for cid in world.nodes:
        world.close(cid)
    newest = max(node.document.version for node in world.nodes.values())
    members = [node for cid, node in world.nodes.items() if cid in node.document.cids]
    followed = [node for node in members if node.document.version == newest]
    assert followed[0].document.cids <= {node.cid for node in followed}
    assert [node.cid for node in world.nodes.values() if world.is_open(node)] == [followed[0].document.master]


def test_a_story_can_be_read() -> None:
    world = World(3, witnesses=1)
    world.beat(1)
    world.isolate(1)
    world.stand(2)
    world.settle()
    world.pass_time(11)
    win(world, 2)
    world.cut.clear()
    world.spread(2)
    world.settle()
    assert [line.split(" s  ", 1)[1] for line in world.log] == [
        "world: master 1, 1 slaves, 1 witnesses, fence lease",
        "1 opens its tables in epoch 1",
        "2 stands for epoch 2",
        "3 does not vote for 2: CID 3 has promised itself to CID 1 less than a lease ago",
        "2 stands for epoch 2",
        "3 votes for 2 in epoch 2",
        "2 is master of epoch 2, by the votes of [2, 3]",
        "3 takes document 2.4 from 2",
        "2 opens its tables in epoch 2",
        "1 takes document 2.4 from 2",
    ]


# -- each rule is needed: a story that ends well with it, and in a violation without it


def restarted_after_promising(world: World) -> None:
    heard_by(world, 2)
    world.crash(2)
    world.restart(2)
    world.isolate(1)
    win(world, 2)


def acknowledged_late(world: World) -> None:
    world.request(1)
    world.pick("request", 1)
    world.pass_time(8)
    world.pick("ack")
    world.pass_time(3)
    world.isolate(1)
    win(world, 2)


def two_stand_at_once(world: World) -> None:
    world.pass_time(20)
    world.stand(2)
    world.stand(3)
    world.settle()


def killed_while_it_votes(world: World) -> None:
    world.pass_time(20)
    world.stand(2)
    number = next(number for number, one in enumerate(world.network) if (one.kind, one.target) == ("ask", 1))
    world.deliver(number)
    world.crash(1)
    world.restart(1)
    world.pass_time(20)
    world.stand(3)
    world.settle()


def cut_off_and_replaced(world: World) -> None:
    world.beat(1)
    world.isolate(1)
    win(world, 2)


def forced_and_fenced_again(world: World) -> None:
    world.strict = True
    heard_by(world, 3)
    world.isolate(1)
    world.force(2)
    world.settle()
    for _ in range(2):
        world.beat(2)
        world.change(2, "fence")
    world.beat(2)


def acknowledged_after_its_vote(world: World) -> None:
    world.beat(1)
    world.pass_time(11)
    world.stand(2)
    world.pick("ask", 2, 3)
    world.request(1)
    world.pick("request", 1, 3)
    world.pick("ack", 3)
    world.pick("vote", 3)


def changed_after_the_vote(world: World) -> None:
    world.beat(1)
    world.pass_time(11)
    world.stand(2)
    world.pick("ask", 2, 3)
    world.change(1, "touch")
    world.pick("document", 1, 3)
    world.network[:] = [one for one in world.network if one.kind == "vote"]
    world.request(1)
    world.pick("request", 1, 3)
    world.pick("ack", 3)
    world.pass_time(20)
    world.pick("vote", 3)


def one_vote_of_three(world: World) -> None:
    world.pass_time(20)
    world.isolate(2)
    world.stand(2)


def one_acknowledgement_of_five(world: World) -> None:
    world.cut = {frozenset((one, two)) for one in (1, 2) for two in (3, 4, 5)}
    world.beat(1)
    win(world, 3)


def clocks_that_run_apart(world: World) -> None:
    for cid in world.nodes:
        world.set_clock(cid, 0.96 if cid == 1 else 1.04)
    world.beat(1)
    world.pass_time(9.9)
    world.isolate(1)
    win(world, 2)


def let_go_and_taken_up(world: World) -> None:
    world.beat(1)
    world.hand_over(1)
    world.take_up(1)
    world.request(1)
    world.pick("request", 1)
    world.pick("ack")
    world.pick("release")
    world.isolate(1)
    win(world, 2)


def elected_again_and_replaced(world: World) -> None:
    heard_by(world, 3)
    world.network.clear()
    world.stand(1)
    world.pick("ask", 1, 3)
    world.pick("vote", 3)
    world.pick("document")
    world.stand(2)
    world.settle()


def went_on_after_its_vote(world: World) -> None:
    world.beat(1)
    world.pass_time(11)
    world.stand(2)
    world.pick("ask", 2, 1)
    world.request(1)
    world.pick("request", 1, 3)
    world.pick("ack", 3)
    world.pick("vote", 1)


def newcomer_of_a_master_cut_off(world: World) -> None:
    world.beat(1)
    world.isolate(1)
    world.change(1, "join")
    world.pass_time(11)
    win(world, 2)
    world.change(2, "join")
    world.settle()
    world.beat(2)


def removed_by_a_master_cut_off(world: World) -> None:
    world.beat(1)
    world.isolate(1)
    for _ in range(2):
        world.change(1, "delete", 3)
        world.change(1, "delete", 2)
    world.pass_time(11)
    world.cut = {frozenset((one, two)) for one in (1, 2) for two in (3, 4, 5)}
    world.settle()
    win(world, 3)
    world.stand(2)
    world.settle()
    world.beat(1)


def forced_beside_the_vote(world: World) -> None:
    world.pass_time(20)
    world.isolate(3)
    win(world, 2)
    world.force(3)
    world.change(3, "touch")
    world.change(3, "touch")
    world.cut.clear()
    world.spread(3)
    world.settle()


def heard_by(world: World, cid: int) -> None:
    """Have the first master ask, and be heard by one member alone."""
    world.request(1)
    world.pick("request", 1, cid)
    world.pick("ack")


def win(world: World, cid: int) -> None:
    world.stand(cid)
    world.settle()
    world.beat(cid)


STORIES = [
    ("no wait after restart", restarted_after_promising, 3),
    ("lease from receipt", acknowledged_late, 3),
    ("votes twice", two_stand_at_once, 3),
    ("sends before it writes", killed_while_it_votes, 3),
    ("breaks its promise", cut_off_and_replaced, 3),
    ("promises to all", forced_and_fenced_again, 3),
    ("acknowledges after voting", acknowledged_after_its_vote, 3),
    ("takes what its vote does not know+acknowledges after voting", changed_after_the_vote, 3),
    ("a minority is enough", one_vote_of_three, 3),
    ("counts everybody", one_acknowledgement_of_five, 5),
    ("no margin", clocks_that_run_apart, 3),
    ("late release", let_go_and_taken_up, 3),
    ("forgets its lease", elected_again_and_replaced, 3),
    ("leads after voting", went_on_after_its_vote, 3),
    ("admits at once", newcomer_of_a_master_cut_off, 3),
    ("members change at once", removed_by_a_master_cut_off, 5),
    ("forced is as good", forced_beside_the_vote, 3),
]


@pytest.mark.parametrize(("fault", "story", "voters"), STORIES, ids=[fault for fault, _, _ in STORIES])
def test_each_rule_is_needed(fault: str, story: Callable[[World], None], voters: int) -> None:
    story(World(voters))
    with pytest.raises((Violation, MembershipError)):
        story(World(voters, faults=frozenset(fault.split("+"))))
