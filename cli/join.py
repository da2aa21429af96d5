"""`pmgcm join`: makes this node a member of an existing cluster; its database becomes a copy of the master's.

The order is the point: everything that can be checked is checked before the master is asked to admit this node, and the
old database is dropped only when the copy is complete. Whatever fails, or is interrupted, leaves this node as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import amount, ask, confirm, note, printable, say
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.state import NodeKeys
    from pmgsync.config import NodeConfig
    from pmgsync.link import Peer
    from pmgsync.membership import ClusterDocument
    from pmgsync.postgres.restore import DatabaseRestore
    from pmgsync.profile import Profile

DEFAULT_PORT = 7672
ROOM_FACTOR = 1.5
"""The copy is loaded beside the old database, with its indexes and some WAL."""
JOIN_CMD = "run `pmgcm join-cmd` on the master; it prints the whole line, with fingerprint and token"


def join(
    context: typer.Context,
    master_ip: Annotated[str, typer.Argument(metavar="MASTER_IP", help="The master's address")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The master's join port")] = DEFAULT_PORT,
    fingerprint: Annotated[str | None, typer.Option(help="The master's key, as `pmgcm join-cmd` prints it")] = None,
    token: Annotated[str | None, typer.Option(help="From `pmgcm join-cmd`; asked for when not given")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before this node's database is replaced")] = False,
) -> None:
    """Join a cluster: this node's database becomes a copy of the master's. Nothing changes unless all goes well."""
    from broker.door_client import DoorClient
    from broker.state import StateDirectory
    from cli.create import own_member
    from cli.node import held_document, load, tell_broker
    from cli.services import stopped
    from pmgsync.membership import parse_fingerprint
    from pmgsync.profile import load_profile

    config = load(context)
    profile = load_profile(config.profile)
    state = StateDirectory(config.state_dir)
    held_document(state)
    if not fingerprint:
        raise MembershipError("the master's fingerprint is missing (--fingerprint)", hint=JOIN_CMD)
    server_key = parse_fingerprint(fingerprint)
    local = check_here(config, profile)
    token = token or ask("token", without_terminal=JOIN_CMD)
    keys = state.keys()
    with DoorClient(master_ip, port, server_key, keys) as door:
        facts = door.check(token)
        check_there(config, profile, local, facts)
        announce(config, local, facts)
        if not yes:
            confirm("Go on?")
        with stopped(profile.services):
            cid, signed = door.admit(token, own_member(config, keys, 1))
