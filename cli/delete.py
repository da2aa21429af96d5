"""`pmgcm delete`: takes a node out of the cluster, on the master."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from cli.console import confirm, note, say
from pmgsync.errors import MembershipError

PATIENCE_S = 10.0
PAUSE_S = 0.3


def delete(
    context: typer.Context,
    cid: Annotated[int, typer.Argument(metavar="CID", min=1, help="The node's number in `pmgcm status`")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Remove a node from the cluster; its connections are cut, its database stays as it is. On the master only."""
    from cli.local_node import change_cluster, cluster_defined, held_documents, load
    from pmgsync.core.membership import no_cluster, without_member

    config = load(context)
    if not cluster_defined(config):
        raise no_cluster()
    document = held_documents(config).master_document()
    without_member(document, cid)
    member = document.member(cid)
    assert member is not None
    if not yes:
        confirm(f"Node {member.name} ({cid}, {member.address}) will be removed from {document.name!r}.")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            change_cluster(
                config,
                {"op": "member.delete", "cid": cid},
                offline=lambda documents: documents.delete(cid),
                done=lambda documents: cid not in documents.document.cids,
            )
            break
        except MembershipError as error:
            # The last change is not with a majority yet.
            if not error.recoverable or time.monotonic() > deadline:
                raise
            time.sleep(PAUSE_S)
    say(f"node {member.name} ({cid}) was removed")
    note("what the cluster has made on it goes with `pmgcm leave`, on that node")
