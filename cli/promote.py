"""`pmgcm promote`: makes this node the master. The broker does it; here it is asked for, and each step is shown."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import InterruptedBySignalError, Say, confirm, note, printable, say, say_json
from cli.promotion_plan import render_loss, render_plan
from pmgsync.errors import MembershipError, UnreachableError

if TYPE_CHECKING:
    from pmgsync.wire.link import BrokerLink

PING_S = 1.0
"""So often it is looked whether the broker is still there."""
SILENCE_S = 15.0
SETTLE_S = 0.2


def promote(
    context: typer.Context,
    force: Annotated[bool, typer.Option("--force", help="Do it without a majority")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask when something may be lost")] = False,
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
        tell = note if as_json else say
        if plan["way"] != "unfinished":
            tell("\n".join(render_plan(plan, would=False)))
        agreed = yes or (plan["way"] in QUESTIONS and confirm(QUESTIONS[plan["way"]]))
        try:
            result = run(link, force=force, agreed=agreed, tell=tell)
        except InterruptedBySignalError:
            note("the promotion goes on; `pmgcm history` says when the epoch has begun, `pmgcm promote` shows the rest")
            raise
    if as_json:
        say_json(result)
        return
    for line in render_result(result):
        say(line)


QUESTIONS = {
    "failover": "What the old master has committed and nobody here has does not count any more.",
    "forced": "Without a majority there may be two masters, and the changes of one will not count.",
}


def read_plan(link: BrokerLink, *, force: bool) -> dict[str, Any]:
    """Return what a promotion would do now, as this node's broker says it.

    Raises:
        PmgsyncError: when there is none.
    """
    while True:
        answer, _ = link.request({"op": "promotion.plan", "force": force})
        plan = answer["result"]
        assert isinstance(plan, dict)
        if plan["settled"]:
            return plan
        # The broker was just started: whoever has not been heard yet may be well.
        time.sleep(SETTLE_S)


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


def run(link: BrokerLink, *, force: bool, agreed: bool, tell: Say) -> dict[str, Any]:
    """Have the broker promote this node, and show each step; return the map of `pmgcm promote --json`.

    Raises:
        PmgsyncError: when the promotion has failed, or the broker is gone.
    """
    from pmgsync.wire.messages import error_from

    request = link.new_id()
    link.send({"op": "promote", "id": request, "force": force, "agreed": agreed})
    heard = time.monotonic()
    while True:
        try:
            received = link.receive(PING_S)
            if received is None:
                link.send({"op": "ping", "id": 0})
        except UnreachableError as error:
            raise lost() from error
        if received is None:
            if time.monotonic() - heard > SILENCE_S:
                raise lost()
            continue
        heard = time.monotonic()
        message, _ = received
        if message["op"] == "error" and message.get("id") == 0:
            raise lost()
        if message.get("id") != request:
            continue
        if message["op"] == "error":
            raise error_from(message)
        if message["op"] == "done":
            result = message["result"]
            assert isinstance(result, dict)
            return result
        tell(f"{message['seconds']:6.2f} s  {printable(message['text'])}")


def lost() -> UnreachableError:
    """Return the error that the broker has gone while it promoted this node."""
    return UnreachableError(
        "pmgsync-broker has gone while it promoted this node",
        hint="when it runs again: `pmgcm history` says whether the epoch has begun; if not, run `pmgcm promote` again",
    )


def render_result(result: Mapping[str, Any]) -> list[str]:
    """Return what has become of it, in lines."""
    lines = [f"this node is master of epoch {result['epoch']}, after {result['seconds']:.2f} s"]
    if result["known_loss"] is not None:
        lines.append(render_loss(result["known_loss"], would=False))
    if result["not_reached"]:
        nodes = ", ".join(map(str, result["not_reached"]))
        lines.append(f"node {nodes} does not know it yet, and follows as soon as it is reached")
    return lines
