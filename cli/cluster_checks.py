"""Checks of the cluster as this node's broker sees it: its members and their clocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cli.status import clock_problem
from pmgsync.core.findings import Finding

if TYPE_CHECKING:
    from pmgsync.core.membership import ClusterDocument
    from pmgsync.core.profile import Profile


def check_cluster(
    status: dict[str, Any] | None, document: ClusterDocument | None, profile: Profile
) -> Iterator[Finding]:
    """Yield what is found; nothing when no cluster is defined here.

    Args:
        status: the broker's status map, None when it does not answer.
        document: the cluster document held, None when there is none.
    """
    if document is None:
        return
    if status is None:
        yield Finding(
            "broker", False, "pmgsync-broker does not answer here", "start it: systemctl start pmgsync-broker"
        )
        return
    yield Finding("broker", True)
    for node in status.get("nodes", ()):
        if node["error"]:
            yield Finding("members", False, f"{node['name']}({node['cid']}): {node['error']}", "see `pmgcm status`")
        if skew := clock_problem(node):
            why = ": rules that take the latest value compare them" if profile.compares_times else ""
            yield Finding(
                "clocks", not profile.compares_times, f"the clock of {node['name']}({node['cid']}) is {skew}",
                f"synchronise the clocks (chrony, systemd-timesyncd){why}",
            )  # fmt: skip
