"""Whether a cluster under test is well."""

from __future__ import annotations

from collections.abc import Callable

from pmgsync.core.positions import parse_lsn
from tests.harness.cluster import Cluster, Node, eventually

NewCluster = Callable[..., Cluster]


def alerts(node: Node, cid: int) -> str:
    """Return the alerts and the error of a member as one text."""
    found = node.node_status(cid)
    return " | ".join([found["error"] or "", *(alert["text"] for alert in found["alerts"])])


def wait_healthy(cluster: Cluster) -> None:
    """Wait until every node is active on the master's status."""
    eventually(
        lambda: all(node["state"] == "A" for node in cluster.master.status()["nodes"]),
        within_s=60,
        what="all nodes active",
    )


def confirmed_lsn(node: Node) -> int:
    return parse_lsn(node.sql("SELECT confirmed_flush_lsn::text FROM pg_replication_slots")[0][0])
