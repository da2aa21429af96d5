"""`pmgcm files`: the trees of files on every node, and an administrator's word that one which stopped is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cli.console import CommandFailedError, printable, say, say_json


def files(
    context: typer.Context,
    accept: Annotated[
        str,
        typer.Option(metavar="TREE", help="A tree that has stopped on this node is as it should be"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: {nodes: [{cid, name, trees}]}")] = False,
) -> None:
    """Show the trees of files on all nodes. Exit code 1 when one is behind or in trouble."""
    from cli.local_node import load, member_broker, read_status

    with member_broker(load(context)) as link:
        if accept:
            for _ in link.call("files.accept", {"tree": accept}):
                pass
            say(f"{accept} is taken as it is now")
            return
        nodes = read_status(link)["nodes"]
    if as_json:
        say_json({"nodes": [{key: node[key] for key in ("cid", "name", "trees")} for node in nodes]})
    else:
        for node in nodes:
            say(f"{printable(node['name'])}({node['cid']})")
            for tree in node["trees"]:
                say("  " + _line(tree))
    if any(tree["behind"] or tree["error"] for node in nodes for tree in node["trees"]):
        raise CommandFailedError


def _line(tree: Mapping[str, Any]) -> str:
    size = f"{tree['files']:>8} files {tree['bytes'] >> 20:>7} MiB"
    text = f"{printable(tree['tree']):40} of node {tree['owner']:<3} {size}"
    if tree["behind"]:
        text += f"  {tree['behind']} behind, for {tree['behind_s']:.0f} s"
    if tree["findings"]:
        text += f"  {tree['findings']} left out"
    return text + (f"  {printable(tree['error'])}" if tree["error"] else "")
