"""`pmgcm join --witness`: makes this machine a member that has a vote and keeps journals, and no database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.console import confirm, note, printable, say
from pmgsync.core.findings import raise_for

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig

SUGGESTION = (
    "with two members the master is not fenced: a promotion while they do not see each other leaves two masters. A "
    "third member, or a witness (`pmgcm join --witness`, a small machine without a database), prevents that"
)


def join_as_witness(
    config: NodeConfig,
    master_ip: str,
    port: int,
    key_port: int,
    *,
    fingerprint: str | None,
    token: str | None,
    password_file: Path | None,
    yes: bool,
) -> None:
    """Join. Nothing but the state directory changes here.

    Raises:
        PmgsyncError: when it cannot be done.
    """
    from broker.cluster.door_client import DoorClient
    from broker.cluster.identity import own_witness
    from broker.cluster.state_directory import StateDirectory
    from cli.join_checks import place_finding
    from cli.join_proof import proof, server_key
    from cli.local_node import change_cluster
    from cli.port_checks import port_findings

    raise_for(port_findings(config))
    master_key = server_key(master_ip, key_port, fingerprint, yes=yes)
    proved = proof(token, password_file)
    keys = StateDirectory(config.state_dir).keys()
    own = own_witness(config, keys)
    with DoorClient(master_ip, port, master_key, keys) as door:
        facts = door.check(own, **proved)
    raise_for([place_finding(facts)])
    cluster = printable(str(facts.get("cluster")))
    note(f"This machine, {config.name} ({config.address}), will be a witness of the cluster {cluster!r}.")
    note("It has a vote when a master is elected, keeps what the members publish for a while, and needs no database.")
    if not yes:
        confirm("Go on?")
    with DoorClient(master_ip, port, master_key, keys) as door:
        cid, signed = door.admit(str(facts.get("token", "")), own)
    change_cluster(
        config,
        {"op": "cluster.enter"},
        signed.pack(),
        offline=lambda documents: documents.enter(signed),
        done=lambda documents: documents.is_member_of(signed.document.cluster),
    )
    say(f"this machine is {config.name}({cid}), a witness of the cluster {signed.document.name!r}")
