"""`pmgcm history`: the epochs of the cluster: since when which node is master, and why."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import printable, say, say_json

if TYPE_CHECKING:
    from pmgsync.core.document import ClusterDocument, Epoch, Fork


def history(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Show the cluster's epochs: when each began, its master, why, by whose votes, and where it left the old chain."""
    from cli.local_node import cluster_defined, held_documents, load
    from pmgsync.core.membership import no_cluster

    config = load(context)
    if not cluster_defined(config):
        raise no_cluster()
    document = held_documents(config).document
    if as_json:
        say_json({"cluster": document.name, "epochs": [describe(document, entry) for entry in document.history]})
    else:
        say("\n".join(render(document)))


def describe(document: ClusterDocument, entry: Epoch) -> dict[str, Any]:
    """Return the map that `--json` prints of an epoch."""
    return {
        "epoch": entry.epoch,
        "master": entry.master,
        "name": _name(document, entry.master),
        "when": round(entry.when / 1e6, 3) if entry.when else None,
        "reason": entry.reason,
        "forced": entry.forced,
        "votes": [vote.cid for vote in entry.votes],
        "fork": _place(entry.fork),
        "start": _place(entry.start),
        "over": [list(pair) for pair in entry.over],
    }


def render(document: ClusterDocument) -> list[str]:
    """Return the lines of the table."""
    lines = [f"{'EPOCH':>5}  {'MASTER':<20} {'SINCE':<19}  {'VOTES':<14} WHY"]
    for number, entry in enumerate(document.history):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.when / 1e6)) if entry.when else "-"
        votes = "by force" if entry.forced else ", ".join(str(vote.cid) for vote in entry.votes) or "-"
        who = printable(f"{_name(document, entry.master) or '-'}({entry.master})")
        lines.append(f"{entry.epoch:>5}  {who:<20} {since:<19}  {votes:<14} {printable(entry.reason)}".rstrip())
        if entry.fork is not None:
            before = document.history[number - 1].master
            place = _place(entry.fork)
            lines.append(f"{'':>5}  goes on where the chain of node {before} was at {place and place['lsn']}")
        if entry.over:
            lines.append(f"{'':>5}  replaces " + ", ".join(f"epoch {epoch} of node {cid}" for epoch, cid in entry.over))
    return lines


def _name(document: ClusterDocument, cid: int) -> str | None:
    member = document.member(cid)
    return member.name if member is not None else None


def _place(fork: Fork | None) -> dict[str, Any] | None:
    from pmgsync.core.positions import format_lsn

    return None if fork is None else {"incarnation": f"{fork.incarnation:016x}", "lsn": format_lsn(fork.lsn)}
