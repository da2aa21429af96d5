"""Replicas that write against the rules, purge, and hear of each other late: a model of applying with repair.

A replica's chain holds every row that it wrote. Applying a row merges it; when the result is another row than the one
that came, the replica owes a repair, which writes its row again, unchanged, to its own chain.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pure.test_merging import Row, merge, rows

REPLICAS = 3
ROUNDS = 60
"""More than any run needs: every repair that is owed after the first round takes a value higher up a finite order."""

events = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, REPLICAS - 1), rows),
        st.tuples(st.just("purge"), st.integers(0, REPLICAS - 1), st.none()),
        st.tuples(st.just("repair"), st.integers(0, REPLICAS - 1), st.none()),
        st.tuples(st.just("deliver"), st.integers(0, REPLICAS - 1), st.integers(0, REPLICAS - 1)),
    ),
    max_size=30,
)


class Model:
    """Replicas of one row."""

    def __init__(self) -> None:
        self.rows: list[Row | None] = [None] * REPLICAS
        self.chains: list[list[Row]] = [[] for _ in range(REPLICAS)]
        self.heard = [[0] * REPLICAS for _ in range(REPLICAS)]
        self.owed = [False] * REPLICAS

    def write(self, replica: int, row: Row) -> None:
        self.rows[replica] = row
        self.chains[replica].append(row)

    def purge(self, replica: int) -> None:
        """Forget the row, unless something of it is still on its way: rows are purged by age, long after all that."""
        arrived = all(
            heard[origin] == len(self.chains[origin])
            for number, heard in enumerate(self.heard)
            for origin in range(REPLICAS)
            if origin != number
        )
        if arrived and not any(self.owed):
            self.rows[replica] = None

    def repair(self, replica: int) -> bool:
        row, owed = self.rows[replica], self.owed[replica]
        self.owed[replica] = False
        if owed and row is not None:
            self.chains[replica].append(row)
        return owed

    def deliver(self, origin: int, replica: int) -> bool:
        if origin == replica or self.heard[replica][origin] == len(self.chains[origin]):
            return False
        theirs = self.chains[origin][self.heard[replica][origin]]
        self.heard[replica][origin] += 1
        mine = self.rows[replica]
        self.rows[replica] = merged = theirs if mine is None else merge(mine, theirs)
        self.owed[replica] |= merged != theirs
        return True

    def settle(self) -> int:
        """Let everything arrive and every repair be made; returns how many rounds that took."""
        for number in range(ROUNDS):
            moved = [self.deliver(a, b) for _ in range(200) for a in range(REPLICAS) for b in range(REPLICAS)]
            repaired = [self.repair(replica) for replica in range(REPLICAS)]
            if not any(moved) and not any(repaired):
                return number
        raise AssertionError("the replicas do not come to rest")


def run(model: Model, happened: list[Any]) -> None:
    for kind, replica, more in happened:
        match kind:
            case "write":
                model.write(replica, more)
            case "purge":
                model.purge(replica)
            case "repair":
                model.repair(replica)
            case _:
                model.deliver(replica, more)


@settings(deadline=None)
@given(events)
def test_replicas_that_have_the_row_are_equal_in_the_end(happened: list[Any]) -> None:
    model = Model()
    run(model, happened)
    model.settle()
    present = [row for row in model.rows if row is not None]
    assert all(row == present[0] for row in present)


def test_a_write_against_a_rule_comes_back() -> None:
    """Nobody sends a node its own change back: without a repair it would keep what it alone believes."""
    model = Model()
    done = {"key": 1, "high": 5, "low": 1, "status": "D", "seen": None, "seenmtime": None}
    done |= {"data": None, "more": None, "mtime": 7}
    model.write(0, done)
    model.settle()
    model.write(1, {**done, "status": "N", "mtime": 3})
    for replica in (0, 2):
        model.deliver(1, replica)
    assert model.rows[1] != model.rows[0] == done
    assert model.settle() <= 3
    assert model.rows == [done] * REPLICAS


def test_a_purge_before_the_others_have_heard_is_a_known_limit() -> None:
    """The one who purged takes a lesser row for good: the others have the better one from itself and owe it nothing."""
    model = Model()
    row: Row = dict.fromkeys(("key", "high", "low", "status", "seen", "seenmtime", "data", "more"))
    model.write(1, {**row, "mtime": 7})
    model.rows[1] = None
    model.write(0, {**row, "mtime": 3})
    model.settle()
    assert [row and row["mtime"] for row in model.rows] == [7, 3, 7]
    # Until the next change.
    model.write(0, {**row, "mtime": 8})
    model.settle()
    assert [row and row["mtime"] for row in model.rows] == [8, 8, 8]


def test_a_purge_while_another_write_is_on_its_way_is_the_same_limit() -> None:
    """Who has purged takes the lesser row that comes later; the one who has both keeps the better."""
    model = Model()
    row: Row = dict.fromkeys(("key", "high", "low", "status", "seen", "seenmtime", "data", "more"))
    model.write(1, {**row, "mtime": 7})
    model.deliver(1, 0)
    model.write(2, {**row, "mtime": 3})
    model.deliver(1, 2)
    model.rows[0] = model.rows[1] = None
    model.settle()
    assert [row and row["mtime"] for row in model.rows] == [3, 3, 7]
    model.write(2, {**row, "mtime": 8})
    model.settle()
    assert [row and row["mtime"] for row in model.rows] == [8, 8, 8]


def deleted_beside(other: str, order: tuple[tuple[int, int], ...]) -> list[bool]:
    """Return which replicas have a row in the end that all had, that replica 0 deletes while replica 1 does another
    thing with it: an update, or a delete and an insert of the same key.

    Args:
        order: (origin, replica) of the deliveries, one change each; what is left is delivered afterwards.
    """
    chains = [["delete"], ["update"] if other == "update" else ["delete", "insert"], []]
    here, owed = [False, True, True], [False] * REPLICAS
    heard = [[0] * REPLICAS for _ in range(REPLICAS)]

    def deliver(origin: int, replica: int) -> None:
        if origin == replica or heard[replica][origin] == len(chains[origin]):
            return
        change = chains[origin][heard[replica][origin]]
        heard[replica][origin] += 1
        # An update that finds no row brings it back, for everybody.
        owed[replica] |= change == "update" and not here[replica]
        here[replica] = change != "delete"

    for origin, replica in order:
        deliver(origin, replica)
    for _ in range(ROUNDS):
        for origin in range(REPLICAS):
            for replica in range(REPLICAS):
                deliver(origin, replica)
        for replica in range(REPLICAS):
            if owed[replica] and here[replica]:
                chains[replica].append("update")
            owed[replica] = False
    return here


ORDERS = tuple(permutations([(0, 1), (0, 2), (1, 0), (1, 2), (1, 0), (1, 2)]))


def test_an_update_wins_over_a_delete_in_every_order() -> None:
    assert {tuple(deleted_beside("update", order)) for order in ORDERS} == {(True, True, True)}


def test_a_row_made_anew_beside_a_delete_is_a_known_limit() -> None:
    """The limit that ARCHITECTURE.md states: the one who made the row anew has lost it, and nobody tells."""
    ends = {tuple(deleted_beside("insert", order)) for order in ORDERS}
    assert ends == {(True, False, True), (True, False, False)}
