"""`pmgcm delete`: takes a node out of the cluster, on the master."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import confirm, say
from pmgsync.errors import MembershipError

if TYPE_CHECKING:
    from broker.cluster.state_directory import StateDirectory
    from pmgsync.core.membership import ClusterDocument


def delete(
    context: typer.Context,
    cid: Annotated[int, typer.Argument(metavar="CID", min=1, help="The node's number in `pmgcm status`")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Remove a node from the cluster; its connections are cut, its database stays as it is. On the master only."""
    from broker.cluster.state_directory import StateDirectory
    from cli.local_node import cluster_defined, load, tell_broker
    from pmgsync.core.membership import no_cluster, sign, without_member

    config = load(context)
    if not cluster_defined(config):
        raise no_cluster()
    state = StateDirectory(config.state_dir)
    document = _masters_document(state)
    member = document.member(cid)
    without_member(document, cid)
    assert member is not None
    if not yes:
        confirm(f"Node {member.name} ({cid}, {member.address}) will be removed from {document.name!r}.")
    # Read again: somebody may have joined while the question stood.
    document = _masters_document(state)
    state.store_document(sign(without_member(document, cid), document.master, state.keys().sign_private))
    tell_broker(config)
    if cid in _masters_document(state).cids:
        raise MembershipError(
            "the broker changed the cluster document at the same instant, the node is still a member",
            hint=f"run `pmgcm delete {cid}` again",
        )
    say(f"node {member.name} ({cid}) was removed")


def _masters_document(state: StateDirectory) -> ClusterDocument:
    """Return the cluster document held, on the master only.

    Raises:
        MembershipError: on any other node.
    """
    from pmgsync.core.membership import no_cluster, require_master

    signed = state.document()
    own = state.own_cid(signed.document) if signed else 0
    if signed is None or not own:
        raise no_cluster()
    return require_master(signed.document, own)
