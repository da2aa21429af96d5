"""`pmgcm promote`: makes this node the master. The broker does it; here it is asked for, and each step is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import amount, printable, say, say_json
from pmgsync.errors import MembershipError

if TYPE_CHECKING:
    from pmgsync.wire.link import BrokerLink


def promote(
    context: typer.Context,
    force: Annotated[bool, typer.Option("--force", help="Do it without a majority")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and lost; do nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Make this node the master: the old one hands over when it answers, else a majority of the members votes."""
    from cli.local_node import load, member_broker

    with member_broker(load(context)) as link:
        plan = read_plan(link, force=force)
        if dry_run:
            if as_json:
                say_json(plan)
            else:
                say("\n".join(render_plan(plan)))
            return
        refuse(plan)


def read_plan(link: BrokerLink, *, force: bool) -> dict[str, Any]:
    """Return what a promotion would do now, as this node's broker says it.

    Raises:
        PmgsyncError: when there is none.
    """
    answer, _ = link.request({"op": "promotion.plan", "force": force})
    plan = answer["result"]
    assert isinstance(plan, dict)
    return plan


def refuse(plan: Mapping[str, Any]) -> None:
    """Refuse what cannot be done.

    Raises:
        MembershipError: when it cannot.
    """
    if plan["way"] == "is_master":
        raise MembershipError(plan["reason"])
    if plan["way"] == "refused":
        forceable = plan["fork"] is not None
        raise MembershipError(
            plan["reason"],
            hint="`pmgcm promote --dry-run` says who answers; --force does it without a majority" if forceable else "",
        )


def render_plan(plan: Mapping[str, Any]) -> list[str]:
    """Return what a plan says, in lines."""
    node, master = plan["node"], plan["master"]
    lines = []
    if plan["way"] == "is_master":
        return [plan["reason"]]
    lines.append(f"node {printable(node['name'])} ({node['cid']}) would become master: {WAYS[plan['way']]}")
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
        lines.append("nothing would be lost: the master closes its tables, and this node takes all it has")
        return lines
    if plan["way"] == "refused" and plan["fork"] is None:
        return lines
    if fetch := plan["fetch"]:
        lines.append(f"would be fetched first: the chain up to {fetch['upto']}, from node {fetch['cid']}")
    lines.append(_loss(plan))
    lines.append("  what the master has committed since it was last heard is not known here, and does not count either")
    if plan["unreadable"]:
        nodes = ", ".join(map(str, plan["unreadable"]))
        lines.append(f"  node {nodes} holds another life of that chain: whether it has more cannot be told")
    if plan["way"] == "failover" and plan["fence"] == "lease":
        lines.append(f"the master's lease would be waited for, {plan['wait_s']:.1f} s as this node sees it")
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


def _loss(plan: Mapping[str, Any]) -> str:
    loss = plan["known_loss"]
    if loss is None:
        return f"nothing that is known to have been published would be lost (the new epoch begins at {plan['fork']})"
    return (
        f"would be lost: what the master has published after {loss['after']} up to {loss['upto']} "
        f"({amount(loss['bytes'])} of WAL), which nobody who answers has"
    )
