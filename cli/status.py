"""`pmgcm status`: every member with its role, state and load. The rendering is pure; the broker has the facts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, printable, say, say_json

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig

WATCH_S = 1.0
IN_SYNC = "A"
NAME_WIDTH, ADDRESS_WIDTH, ROLE_WIDTH = 18, 15, 6
SHOWN = 5
"""Counters of conflicts, and refusals, that the table shows; JSON has more."""
_CLEAR = "\x1b[H\x1b[2J"


def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again each second until interrupted")] = False,
) -> None:
    """Show all members: role, state, load, lag. Exit code 1 when one is not in sync."""
    from cli.local_node import load, member_broker, read_status

    config = load(context)
    if watch:
        _watch(config, as_json=as_json)
    if as_json:
        _say_removed(config)
    with member_broker(config) as link:
        current = read_status(link)
    if as_json:
        say_json(current)
    else:
        say("\n".join(render(current, clocks_matter=_clocks_matter(config))))
    if not in_sync(current):
        raise CommandFailedError


def _say_removed(config: NodeConfig) -> None:
    """Print the map of a node that was removed from its cluster, if this is one."""
    from cli.local_node import cluster_defined, held_documents

    if not cluster_defined(config):
        return
    documents = held_documents(config)
    if documents.signed is not None and not documents.cid:
        document = documents.signed.document
        place = {"cluster": document.name, "epoch": document.epoch, "master": document.master}
        say_json({**place, "removed": True, "lease": None, "nodes": []})
        raise CommandFailedError


def _watch(config: NodeConfig, *, as_json: bool) -> None:
    """Show the status until a signal ends it; a broker that goes away is waited for."""
    import time

    from cli.local_node import member_broker, read_status
    from pmgsync.errors import UnreachableError

    clocks_matter = _clocks_matter(config)
    clear = _CLEAR if sys.stdout.isatty() and not as_json else ""
    while True:
        try:
            with member_broker(config) as link:
                while True:
                    current = read_status(link)
                    if as_json:
                        say_json(current)
                    else:
                        say(clear + "\n".join(render(current, clocks_matter=clocks_matter)) + ("" if clear else "\n"))
                    time.sleep(WATCH_S)
        except UnreachableError as error:
            if as_json:
                say_json({"error": error.message})
            else:
                say(clear + error.message)
            time.sleep(WATCH_S)


def _clocks_matter(config: NodeConfig) -> bool:
    """Return True when the profile has rules that compare times; one that cannot be read is others' to complain of."""
    from pmgsync.errors import ConfigError
    from pmgsync.profile_file import load_profile

    try:
        return load_profile(config.profile).compares_times
    except ConfigError:
        return False


def in_sync(status: Mapping[str, Any]) -> bool:
    """Return True when every member is."""
    return all(node["state"] == IN_SYNC for node in status["nodes"])


def render(status: Mapping[str, Any], *, clocks_matter: bool = False) -> list[str]:
    """Return the table's lines, with what there is to say of each node below it.

    Args:
        clocks_matter: warn of clocks that differ.
    """
    nodes: Sequence[Mapping[str, Any]] = status["nodes"]
    names = [printable(f"{node['name']}({node['cid']})") for node in nodes]
    addresses = [printable(node["ip"]) for node in nodes]
    # Wider than usual only for long names and IPv6 addresses: scripts know the columns.
    name_width = max([NAME_WIDTH, *map(len, names)])
    address_width = max([ADDRESS_WIDTH, *map(len, addresses)])
    role_width = max([ROLE_WIDTH, *(len(node["role"]) for node in nodes)])
    more = name_width - NAME_WIDTH + address_width - ADDRESS_WIDTH
    dashes, wider = "-" * (14 + more), "-" * (role_width - ROLE_WIDTH)
    lines = [f"NAME(CID){dashes}IPADDRESS----ROLE{wider}-STATE---------UPTIME---LOAD----MEM---DISK"]
    for node, name, address in zip(nodes, names, addresses, strict=True):
        line = f"{name:<{name_width}} {address:>{address_width}}   {node['role']:<{role_width}} "
        lines.append(line + _rest(node))
    for node, name in zip(nodes, names, strict=True):
        lines += [f"{name}: {note}" for note in notes(node)]
        if clocks_matter and (skew := clock_problem(node)):
            lines.append(f"{name}: clock: {skew}; rules that take the latest value compare clocks")
    return lines + lease_lines(status) + synchronous_lines(status) + refused_lines(status)


def refused_lines(status: Mapping[str, Any]) -> list[str]:
    """Return what this node has refused to others lately, a line an address and reason, the newest first."""
    refused = status.get("refused") or []
    names = {node["ip"]: f"{node['name']}({node['cid']}) at " for node in status["nodes"]}
    lines = []
    for one in refused[:SHOWN]:
        who = names.get(one["address"], "") + (one["address"] or "an address that is not known")
        times = f"{one['count']} times, last " if one["count"] > 1 else ""
        lines.append(
            printable(f"refused on port {one['port']}: {who}: {one['reason']} ({times}{one['last_s']:.0f} s ago)")
        )
    if len(refused) > SHOWN:
        lines.append(f"refused: {len(refused) - SHOWN} more, see --json")
    return lines


def lease_lines(status: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of the master's lease: one line, none for a cluster of one."""
    lease = status.get("lease")
    if lease is None or len(status["nodes"]) < 2:
        return []
    names = {node["cid"]: printable(f"{node['name']}({node['cid']})") for node in status["nodes"]}

    def named(cid: int) -> str:
        return names.get(cid, f"CID {cid}")

    voters, needed = lease["voters"], lease["majority"]
    begin = f"epoch {status['epoch']}, master {named(status['master'])}; "
    if lease["handing_over"]:
        what = "its tables are closed: it hands over to another node"
    elif lease["has_voted_away"]:
        what = "its tables are closed: it has voted for another"
    elif lease["fence"] == "none":
        what = f"fence: none, the master always writes: {_why_none(lease)}"
    elif not lease["is_master"]:
        promised = lease["promised_to"]
        to = f"promised to {named(promised)} for {lease['promised_s']:.1f} s" if promised else "nobody is promised to"
        what = f"lease: {lease['lease_s']:g} s; here {to}"
    else:
        left = "without end" if lease["left_s"] is None else f"{lease['left_s']:.1f} s left"
        left = left if lease["open"] else "none, the tables are closed"
        what = f"lease: {left}, acknowledged by {len(lease['acknowledged'])} of {voters}, {needed} are needed"
        if lease["missing"]:
            what += f"; missing {', '.join(map(named, lease['missing']))}"
    return [begin + what]


def synchronous_lines(status: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of synchronous mode: one line, none when it is off."""
    mode = status.get("synchronous")
    if mode is None or not mode["slaves"]:
        return []
    wanted = f"{mode['slaves']} slave{'s' if mode['slaves'] > 1 else ''}, {mode['level']}"
    patience = "without end" if mode["patience_s"] is None else f"at most {mode['patience_s']:g} s"
    begin = f"synchronous: commits on the master wait for {wanted}, {patience}"
    if mode["state"] is None:
        return [begin if mode["in_force"] else f"{begin}; not in force yet"]
    names = {node["cid"]: printable(f"{node['name']}({node['cid']})") for node in status["nodes"]}
    there = ", ".join(names.get(cid, f"CID {cid}") for cid in mode["in_step"]) or "none"
    what = {
        "synchronous": "",
        "starting": "not yet; ",
        "waiting": f"WAITING for {mode['waiting_s']:.0f} s; ",
        "degraded": "DEGRADED, they do not wait now; ",
    }[mode["state"]]
    return [f"{begin}; {what}in step: {there}"]


def _why_none(lease: Mapping[str, Any]) -> str:
    if lease["wanted"] == "none":
        return 'the cluster was created with [cluster] fence = "none"'
    if lease["voters"] < 3:
        return f"{'two members' if lease['voters'] == 2 else 'one member'} and no witness"
    return "the lease comes in force when a majority holds the cluster document and the triggers stand"


def _rest(node: Mapping[str, Any]) -> str:
    if node["error"]:
        return f"ERROR: {printable(node['error'])}"
    load = "-" if node["load1"] is None else f"{node['load1']:.2f}"
    uptime = "-" if node["uptime_s"] is None else format_uptime(node["uptime_s"])
    return f"{node['state']}{uptime:>15}{load:>7}{_percent(node['mem_pct']):>7}{_percent(node['disk_pct']):>7}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"


def format_uptime(seconds: float) -> str:
    """Return an uptime as `1 day 21:18`, or `00:05` within the first day."""
    minutes = int(seconds) // 60
    days, minutes = divmod(minutes, 24 * 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}"
    return clock if not days else f"{days} day{'s' if days > 1 else ''} {clock}"


def notes(node: Mapping[str, Any]) -> list[str]:
    """Return what there is to say of a node beside its line: its lag, what it waits for, its alerts and conflicts."""
    from cli.console import amount

    found = []
    if node["state"] != IN_SYNC and node["lag_bytes"]:
        found.append(f"{node['lag_s']:.1f} s and {amount(node['lag_bytes'])} behind")
    waiting = node.get("waiting_for") or []
    if waiting and not node["error"]:
        found.append("waiting for " + ", ".join(map(printable, waiting)))
    shown = {node["error"]}
    for alert in node.get("alerts") or []:
        text = str(alert.get("text", ""))
        if text not in shown:
            found.append(printable(f"{alert.get('kind', 'alert')}: {text}"))
            shown.add(text)
    if conflicts := node.get("conflicts"):
        found.append(_conflicts(conflicts))
    return found


def clock_problem(node: Mapping[str, Any]) -> str:
    """Return by how much a node's clock differs when that is too much, "" when it is well or not known."""
    from broker.heartbeats.skew import WARN_S

    skew = node.get("clock_skew_s")
    if skew is None or abs(skew) <= WARN_S:
        return ""
    return f"about {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this node's"


def _conflicts(counters: Mapping[str, int]) -> str:
    total = sum(counters.values())
    ranked = sorted(counters.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{printable(name)} {count}" for name, count in ranked[:SHOWN]]
    more = [f"{len(ranked) - SHOWN} more"] if len(ranked) > SHOWN else []
    return f"conflicts: {total} value{'s' if total > 1 else ''} lost against others: {', '.join(named + more)}"
