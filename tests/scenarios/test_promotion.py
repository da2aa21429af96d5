"""Promotion on a cluster of real processes: what is said before, and what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness.cluster import Cluster, Node, eventually
from tests.harness.schema import STANDARD

pytestmark = pytest.mark.cluster


def plan_of(node: Node, *arguments: str) -> dict[str, Any]:
    """Return what a promotion of a node would do."""
    plan: dict[str, Any] = json.loads(node.pmgcm("promote", "--dry-run", "--json", *arguments).stdout)
    return plan


def kill(node: Node) -> None:
    """End a node's services at once, as a power cut would."""
    for service in ("agent", "broker"):
        node.kill(service)


def test_what_a_promotion_would_do_is_said_before(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    done = first.pmgcm("promote", check=False)
    assert done.returncode == 1
    assert "error: this node is already master" in done.stderr
    plan = plan_of(second)
    assert (plan["way"], plan["reached"], plan["majority"]) == ("switchover", 3, 2)
    assert "nothing would be lost" in second.pmgcm("promote", "--dry-run").stdout

    first.sql("INSERT INTO t SELECT n, 'x' FROM generate_series(9000, 9100) AS n")
    cluster.wait()
    kill(first)
    plan = eventually(lambda: (p := plan_of(second))["way"] == "failover" and p, what="the master's silence is noticed")
    assert plan["master"]["heard_s"] is not None
    assert plan["known_loss"] is None
    other = next(one for one in plan["members"] if one["cid"] == 3)
    assert plan["fork"] == plan["have"] == plan["applied"] == other["applied"]
    text = second.pmgcm("promote", "--dry-run").stdout
    assert "2 of 3 members that have a vote can be reached, 2 are needed" in text
    assert "node3 (3) answers" in text

    kill(third)
    eventually(lambda: plan_of(second)["way"] == "refused", what="the other's silence is noticed")
    done = second.pmgcm("promote", check=False)
    assert done.returncode == 1
    assert "1 of 3 members that have a vote can be reached, 2 are needed" in done.stderr
    assert "--force" in done.stderr
    assert plan_of(second, "--force")["way"] == "forced"
    history = json.loads(second.pmgcm("history", "--json").stdout)["epochs"]
    assert [(entry["epoch"], entry["master"], entry["votes"]) for entry in history] == [(1, 1, [])]
    assert "created" in second.pmgcm("history").stdout


def test_it_is_handed_over_and_taken_over(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster(nodes=3, schema=STANDARD)
    first, second, third = cluster.nodes
    first.sql("INSERT INTO t SELECT n, 'x' FROM generate_series(9000, 9100) AS n")
    done = second.pmgcm("promote", "--yes")
    print(done.stdout, done.stderr)
    second.sql("INSERT INTO t VALUES (9500, 'of the second')")
    cluster.wait(node=second)
    cluster.assert_equal(["t"])
    kill(second)
    eventually(lambda: plan_of(third)["way"] == "failover", what="the master's silence is noticed")
    done = third.pmgcm("promote", "--yes")
    print(done.stdout, done.stderr)
    third.sql("INSERT INTO t VALUES (9501, 'of the third')")
    second.start()
    eventually(lambda: all(one["state"] == "A" for one in second.status()["nodes"]), what="it has returned")
    cluster.wait(node=third)
    cluster.assert_equal(["t"])
