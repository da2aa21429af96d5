"""`pmgcm leave`: removes from this node what a cluster has made on it; its rows and its files stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import confirm, note, say

if TYPE_CHECKING:
    from broker.cluster.documents import Documents


def leave(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, also when this node is still a member")] = False,
    witness: Annotated[bool, typer.Option("--witness", help="This machine has been a witness: no database")] = False,
) -> None:
    """Forget the cluster: slot, publication, schema and triggers go, the data stays. For a node that was deleted."""
    from broker.cluster.conf_file import write_cluster_conf
    from cli.local_node import change_cluster, held_documents, load
    from pmgsync.postgres.setup.leftovers import find_leftovers
    from pmgsync.postgres.setup.provision import deprovision

    config = load(context)
    documents = held_documents(config)
    # One that was deleted already is not in the document.
    witness = witness or (documents.signed is not None and documents.signed.document.is_witness(documents.cid))
    left = [] if witness else find_leftovers(config.dsn)
    if documents.signed is None and not left:
        say("nothing is left of a cluster on this node")
        return
    documents.refuse_to_leave()
    for line in [*_standing(documents), *(f"it will be removed: {phrase}" for phrase in left)]:
        note(line)
    if not yes:
        confirm("The data in the tables stays as it is. Go on?")
    # First: the agent captures no more then, and nothing is made anew behind what is removed.
    if documents.signed is not None:
        change_cluster(
            config,
            {"op": "cluster.leave"},
            offline=lambda held: held.leave(),
            done=lambda held: held.signed is None,
        )
    if witness:
        say("this machine is in no cluster any more")
        return
    deprovision(config.dsn)
    write_cluster_conf(None, config)
    say("this node is in no cluster; nothing of one is left in its database")


def _standing(documents: Documents) -> list[str]:
    """Return what there is to say of a node that is still a member."""
    if documents.signed is None or not documents.cid:
        return []
    document = documents.document
    if len(document.members) == 1:
        return [f"this node is the only one of the cluster {document.name!r}, which ends with it"]
    master = document.member(document.master)
    where = f"{master.name} ({master.address})" if master is not None else "the master"
    return [
        f"this node is still a member of the cluster {document.name!r}",
        f"`pmgcm delete {documents.cid}` on {where} removes it there; until then the others show it as down",
    ]
