"""Chains of nodes that were removed: every database ends with all that anybody has, or with the master's copy."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from broker.chains.endings import Ending, Standing, judge_ending
from broker.heartbeats.heartbeat import Applied, HeldChain
from pmgsync.core.positions import Position

MASTER = 1


def at(lsn: int, incarnation: int = 1) -> Applied:
    return Applied(incarnation, Position(lsn), Position(lsn))


def held(first: int, head: int, incarnation: int = 1, part: int | None = None) -> HeldChain:
    end = Position(head) if part is None else Position(head, part)
    return HeldChain(incarnation, Position(first), end)


def judged(cid: int, standings: dict[int, Standing], *, complete: int | None = None) -> Ending:
    own = standings[cid].held
    if complete is None and own is not None:
        complete = own.head.lsn
    place = Position(complete) if complete is not None else None
    return judge_ending(cid, standings, master=MASTER, databases={1, 2}, complete=place).ending


def test_who_was_not_heard_is_waited_for() -> None:
    done = Standing(True, held(5, 9), at(9))
    assert judged(1, {1: done, 2: done}) is Ending.OVER
    assert judged(1, {1: done, 2: Standing(False, held(5, 9), at(9))}) is Ending.WAITS
    assert judged(1, {1: done, 2: done, 3: Standing(False)}) is Ending.WAITS


def test_parts_of_a_transaction_that_was_never_finished_are_not_waited_for() -> None:
    one = Standing(True, held(5, 12, part=3), at(9))
    assert judged(1, {1: one, 2: one}, complete=9) is Ending.OVER
    # The other one has fewer of them, or more, which are fetched.
    assert judged(1, {1: one, 2: Standing(True, held(5, 12, part=2), at(9))}, complete=9) is Ending.OVER
    assert judged(1, {1: one, 2: Standing(True, held(5, 12, part=4), at(9))}, complete=9) is Ending.WAITS


def test_a_slave_of_another_incarnation_fetches_from_the_master_when_that_is_at_its_end() -> None:
    slave = Standing(True, held(0, 50, 7), at(50, 7))
    assert judged(2, {1: Standing(True, held(5, 9), at(8)), 2: slave}) is Ending.WAITS
    assert judged(2, {1: Standing(True, held(5, 9), at(9)), 2: slave}) is Ending.LOST
    assert judged(1, {1: Standing(True, held(5, 9), at(9)), 2: slave}) is Ending.WAITS
    assert judged(1, {1: Standing(True, held(5, 9), at(9)), 2: Standing(True, over=True)}) is Ending.OVER


def test_a_witness_keeps_it_until_all_databases_are_done() -> None:
    witness = Standing(True, held(0, 9))
    done = Standing(True, over=True)
    assert judged(3, {1: done, 2: Standing(True, held(5, 9), at(9)), 3: witness}) is Ending.WAITS
    assert judged(3, {1: done, 2: done, 3: witness}) is Ending.OVER


@dataclass
class Node:
    """A node of the model: the transactions are the numbers 1 to 9, and a fetch copies what the master has."""

    first: int
    head: int
    applied: int
    up: bool = True
    keeps: bool = True
    over: bool = False
    rows: set[int] = field(default_factory=set)


class Model:
    """Nodes that say how they stand from time to time, apply, fetch, and forget."""

    def __init__(self, places: list[tuple[int, int, int]], seed: int) -> None:
        self.pick = random.Random(seed)
        self.nodes: dict[int, Node] = {}
        self.said: dict[int, Standing] = {}
        for cid, place in enumerate(places, 1):
            first, applied, head = sorted(place)
            if self.pick.random() < 0.2:
                head = applied  # the journal has lost its end
            self.nodes[cid] = Node(first, head, applied, rows=set(range(1, applied + 1)))
        self.known = set(range(1, max(node.head for node in self.nodes.values()) + 1))

    def step(self, *, faults: bool) -> None:
        """Let one node do one thing."""
        cid = self.pick.choice(list(self.nodes))
        node = self.nodes[cid]
        match self.pick.randrange(5):
            case 0:
                chain = held(node.first, node.head) if node.keeps else None
                self.said[cid] = Standing(node.up, chain, at(node.applied) if node.keeps else None, node.over)
            case 1 if node.keeps and node.first <= node.applied < node.head:
                node.applied += 1
                node.rows.add(node.applied)
            case 2 if node.keeps:
                node.head = max(node.head, node.applied)
                if any(other.keeps and other.first <= node.head < other.head for other in self.nodes.values()):
                    node.head += 1
            case 3 if faults and self.pick.random() < 0.1:
                node.up = not node.up
            case 4 if node.keeps and len(self.said) == len(self.nodes):
                self.judge(cid, node)

    def judge(self, cid: int, node: Node) -> None:
        now = {**self.said, cid: Standing(True, held(node.first, node.head), at(node.applied), node.over)}
        verdict = judge_ending(
            cid, now, master=MASTER, databases=self.nodes.keys(), complete=Position(node.head)
        ).ending
        if verdict is Ending.LOST:
            node.rows = set(self.nodes[MASTER].rows)
        if verdict is not Ending.WAITS:
            node.keeps, node.over = False, True


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=2, max_size=4), st.integers(0, 2**32))
def test_all_copies_are_equal_in_the_end_and_nobody_waits_for_ever(
    places: list[tuple[int, int, int]], seed: int
) -> None:
    model = Model(places, seed)
    masters = set(model.nodes[MASTER].rows)
    for _ in range(100):
        model.step(faults=True)
    for node in model.nodes.values():
        node.up = True
    for _ in range(5000):
        if not any(node.keeps for node in model.nodes.values()):
            break
        model.step(faults=False)
    assert not any(node.keeps for node in model.nodes.values()), "somebody waits for ever"
    copies = [node.rows for node in model.nodes.values()]
    assert all(rows == copies[0] for rows in copies)
    assert masters <= copies[0] <= model.known
