"""Promotions that meet, sides of a split that were forced, and slaves that are ahead of the new master: clients write
on all nodes throughout, and each acknowledged write is accounted for. With `-s` each prints its figures in a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import Node, eventually
from tests.harness.failover import SEEDS, Failover, agreed, exported_keys, failovers
from tests.harness.health import NewCluster
from tests.harness.ledger import Outcome
from tests.harness.network import Network

pytestmark = [pytest.mark.cluster, pytest.mark.campaign]

NewNetwork = Callable[[int], Network]


@pytest.fixture
def failover(new_cluster: NewCluster, tmp_path: Path) -> Iterator[Callable[..., Failover]]:
    """Make a cluster with clients; `failover(nodes=3, seed=1)`."""
    with failovers(new_cluster, tmp_path) as make:
        yield make


# -- promotions that meet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("master", ["lives", "is-killed"])
def test_two_promotions_at_once(failover: Callable[..., Failover], master: str, seed: int) -> None:
    scene = failover(nodes=3, seed=seed).load()
    if master == "is-killed":
        scene.kill_machine(scene.nodes[0])
    both = [scene.begin_promotion(node) for node in scene.nodes[1:]]
    said = [process.communicate(timeout=120)[0] for process in both]
    print(*said, sep="\n---\n")
    assert any(process.returncode == 0 for process in both), said
    history = eventually(lambda: agreed(scene.nodes[1:]), what="both survivors hold one document")
    scene.await_open(scene.nodes[history[-1].master - 1])
    if master == "is-killed":
        scene.start_machine(scene.nodes[0])
    account = scene.settle()
    assert account.lost == ()
    assert master == "is-killed" or account.exported == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_two_promotions_at_once_and_a_second_command_that_joins_one(
    failover: Callable[..., Failover], seed: int
) -> None:
    scene = failover(nodes=3, seed=seed).load()
    first, second = scene.random.sample(scene.nodes[1:], 2)
    scene.kill_machine(scene.nodes[0])
    commands = [scene.begin_promotion(first)]
    scene.pause(0.0, 2.0)
    commands += [scene.begin_promotion(second), scene.begin_promotion(first)]
    said = [process.communicate(timeout=120)[0] for process in commands]
    print(*said, sep="\n---\n")
    history = eventually(lambda: agreed(scene.nodes[1:]), what="both survivors hold one document")
    masters = {entry.master for entry in history[1:]}
    # Both commands of one node are told the same, unless the second came after the end.
    assert commands[0].returncode == commands[2].returncode or "already master" in said[2], said
    for node, process in ((first, commands[0]), (second, commands[1])):
        assert process.returncode != 0 or scene.nodes.index(node) + 1 in masters, said
    assert any(process.returncode == 0 for process in commands), said
    scene.await_open(scene.nodes[history[-1].master - 1])
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


# -- by force ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_both_sides_of_a_split_are_forced(
    failover: Callable[..., Failover], new_network: NewNetwork, seed: int
) -> None:
    links = new_network(3)
    scene = failover(nodes=3, seed=seed, namespaces=links.names).load()
    sides = scene.nodes[1:]
    scene.began = time.time()
    for number in (1, 2, 3):
        links.cut(number)
    for node in sides:
        scene.promote(node, "--force")
        scene.await_open(node)
    for number in (2, 3):
        links.heal(number)

    def both_say_so() -> bool:
        return all("split" in (node.node_status(scene.nodes.index(node) + 1)["error"] or "") for node in sides)

    eventually(both_say_so, what="both say that the cluster is split")
    mails = {cid: len(scene.ledger.of("mail", Outcome.ACKNOWLEDGED, cid)) for cid in (2, 3)}
    eventually(lambda: _mails(sides[1], 2) >= mails[2] and _mails(sides[0], 3) >= mails[3], what="mail is exchanged")
    assert not _configuration(sides[0], 3) and not _configuration(sides[1], 2), "the sides are mixed"
    assert exported_keys(sides) == set(), "it was not decided yet"
    links.heal(1)
    stays = scene.random.choice(sides)
    print(stays.pmgcm("decide", "--yes").stdout)
    account = scene.settle()
    assert account.lost == () and account.exported > 0


def _mails(node: Node, cid: int) -> int:
    return int(node.sql("SELECT count(*) FROM mail WHERE cid = %s", (cid,))[0][0])


def _configuration(node: Node, cid: int) -> int:
    return int(node.sql("SELECT count(*) FROM configuration WHERE key LIKE %s", (f"configuration-{cid}-%",))[0][0])


# -- a slave that is ahead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_slave_that_is_ahead_has_is_fetched_from_it(
    failover: Callable[..., Failover], new_network: NewNetwork, seed: int
) -> None:
    links = new_network(3)
    scene = failover(nodes=3, seed=seed, namespaces=links.names).load()
    heir, ahead = scene.nodes[1:]
    links.cut(2)
    scene.pause(0.2, 1.0)
    links.cut(1)  # first: the kernel goes on sending what a process has left when it was killed
    scene.kill_machine(scene.nodes[0])
    scene.note(heir)
    behind = set(ahead.content("configuration")) - set(heir.content("configuration"))
    assert behind, "nobody is ahead"
    links.heal(2)
    eventually(lambda: heir.node_status(3)["heartbeat_age_s"] < 1, what="the two hear each other")
    print(heir.pmgcm("promote", "--yes").stdout)
    assert behind <= set(heir.content("configuration")), "not all of it was fetched"
    scene.await_open(heir)
    links.heal(1)
    scene.start_machine(scene.nodes[0])
    assert scene.settle().lost == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slave_that_was_ahead_exports_what_the_new_master_never_had(
    failover: Callable[..., Failover], new_network: NewNetwork, seed: int
) -> None:
    links = new_network(5)
    scene = failover(nodes=5, seed=seed, namespaces=links.names).load()
    heir, ahead = scene.nodes[1], scene.nodes[4]
    # Three hear nothing for a moment, the other one does; then that one is cut off too, and the master dies.
    for number in (2, 3, 4):
        links.cut(number)
    scene.pause(0.2, 1.0)
    links.cut(5)
    links.cut(1)
    scene.kill_machine(scene.nodes[0])
    behind = set(ahead.content("configuration", "key")) - set(heir.content("configuration", "key"))
    assert behind, "nobody is ahead"
    for number in (2, 3, 4):
        links.heal(number)
    scene.promote(heir)
    scene.await_open(heir)
    for number in (1, 5):
        links.heal(number)
    scene.start_machine(scene.nodes[0])
    account = scene.settle()
    assert account.lost == ()
    # Some of it may still have been on the way to the new master, or was fetched from another one.
    behind -= set(heir.content("configuration", "key"))
    assert behind, "nobody was ahead in the end"
    missing = {key.strip("()") for key in behind} - exported_keys([ahead])
    assert not missing, f"what it was ahead is not in its divergence file: {sorted(missing)[:5]}"
