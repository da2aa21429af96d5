"""What a promotion would do, in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cli.console import amount, printable


def render_plan(plan: Mapping[str, Any], *, would: bool = True) -> list[str]:
    """Return what a plan says, in lines; `would`: it is not done now."""
    node, master = plan["node"], plan["master"]
    is_ = "would be" if would else "is"
    lines = []
    if plan["way"] in {"is_master", "unfinished"}:
        return [plan["reason"]]
    becomes = "would become" if would else "becomes"
    lines.append(f"node {printable(node['name'])} ({node['cid']}) {becomes} master: {WAYS[plan['way']]}")
    lines.append(f"  {printable(plan['reason'])}")
    if master is not None:
        heard = (
            "not since this node's broker was started"
            if master["heard_s"] is None
            else f"{master['heard_s']:.1f} s ago"
        )
        state = "answers" if master["answers"] else f"does not answer; last heard {heard}"
        head = f", its chain was at {master['head']} then" if master["head"] else ""
        lines.append(f"master {printable(master['name'])} ({master['cid']}) {state}{head}")
    lines.append(
        f"this node has its chain up to {plan['have'] or 'nothing'}, applied up to {plan['applied'] or 'nothing'}"
    )
    lines += [_member(one) for one in plan["members"] if master is None or one["cid"] != master["cid"]]
    if plan["way"] == "switchover":
        lines.append(f"nothing {is_} lost: the master closes its tables, and this node takes all it has")
        return lines
    if plan["way"] == "refused" and plan["fork"] is None:
        return lines
    if fetch := plan["fetch"]:
        lines.append(f"{is_} fetched first: the chain up to {fetch['upto']}, from node {fetch['cid']}")
    loss, fork = plan["known_loss"], plan["fork"]
    nothing = f"nothing that is known to have been published {is_} lost"
    lines.append(render_loss(loss, would=would) if loss else f"{nothing} (the new epoch begins at {fork})")
    lines.append("  what the master has committed since it was last heard is not known here, and does not count either")
    if plan["unreadable"]:
        nodes = ", ".join(map(str, plan["unreadable"]))
        lines.append(f"  node {nodes} holds another life of that chain: whether it has more cannot be told")
    if plan["way"] == "failover" and plan["fence"] == "lease":
        lines.append(f"the master's lease {is_} waited for, {plan['wait_s']:.1f} s as this node sees it")
    if plan["way"] == "forced":
        lines.append(
            "by force: if the master lives, there are two until they meet, and the changes of one are exported"
        )
    return lines


WAYS = {
    "switchover": "the master hands over",
    "failover": "a majority votes",
    "forced": "by force",
    "refused": "but that is refused without --force",
}


def _member(one: Mapping[str, Any]) -> str:
    heard = "never heard" if one["heard_s"] is None else f"last heard {one['heard_s']:.1f} s ago"
    what = "answers" if one["answers"] else f"does not answer ({heard})"
    vote = "" if one["votes"] else ", has no vote"
    journal, applied = one["journal"] or "nothing", one["applied"] or "nothing"
    return f"node {printable(one['name'])} ({one['cid']}) {what}{vote}: holds it up to {journal}, applied {applied}"


def render_loss(loss: Mapping[str, Any], *, would: bool) -> str:
    """Return a line on what is known to be lost: after and upto are LSNs, bytes of WAL."""
    return (
        f"{'would be' if would else 'is'} lost: what the master has published after {loss['after']} up to "
        f"{loss['upto']} ({amount(loss['bytes'])} of WAL), which nobody who answers has"
    )
