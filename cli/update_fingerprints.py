"""`pmgcm update-fingerprints`: changes this node's keys, and has the others know what its host shows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import note, say
from pmgsync.errors import PmgsyncError, UnreachableError

if TYPE_CHECKING:
    from broker.cluster.documents import Documents
    from pmgsync.config import NodeConfig
    from pmgsync.core.membership import Member

PATIENCE_S = 30.0
"""So long the master is asked again; a connection is away for an instant after an earlier change of keys."""
ANSWER_S = 10.0
AGAIN_S = 0.5


def update_fingerprints(
    context: typer.Context,
    keep_keys: Annotated[
        bool, typer.Option("--keep-keys", help="Only have certificate, host keys and subscription level read again")
    ] = False,
) -> None:
    """Change this node's keys, while it is in use; the other nodes follow. Also reads its certificate and host keys."""
    from broker.cluster.identity import own_member
    from cli.local_node import held_documents, load, member_broker
    from pmgsync.core.membership import format_fingerprint

    config = load(context)
    with member_broker(config):
        pass
    documents = held_documents(config)
    before = _own(documents)
    shown = own_member(config, documents.keys)
    wanted = (shown.level, shown.host_keys)
    _ask(config, before, shown, keys=not keep_keys)
    documents = held_documents(config)
    after = _own(documents)
    if (before.level, before.host_keys) != wanted:
        say("the cluster knows this node's certificate, host keys and subscription level as they are now")
    if keep_keys:
        return
    say("this node's keys were changed; its fingerprint is now")
    say(f"    {format_fingerprint(after.curve_key)}")
    if after.cid == documents.document.master:
        note("lines that `pmgcm join-cmd` printed before are void")


def _own(documents: Documents) -> Member:
    member = documents.document.member(documents.cid)
    assert member is not None
    return member


def _ask(config: NodeConfig, before: Member, shown: Member, *, keys: bool) -> None:
    """Have the broker make the change.

    Raises:
        PmgsyncError: when it was not made, or nothing was heard of it.
    """
    from cli.local_node import broker, held_documents

    request: dict[str, Any] = {
        "op": "member.update",
        "keys": keys,
        "level": shown.level,
        "host_keys": dict(shown.host_keys),
    }
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with broker(config) as link:
                link.request(request, timeout_s=ANSWER_S)
            return
        except UnreachableError as error:
            # The broker may have been restarted after it had asked, or the answer be on its way.
            if keys and _own(held_documents(config)).curve_key != before.curve_key:
                return
            if time.monotonic() > deadline:
                raise
            problem: PmgsyncError = error
        note(f"waiting: {problem.message}")
        time.sleep(AGAIN_S)
