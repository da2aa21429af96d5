"""`pmgcm decide`: after promotions were forced on two sides, keeps this one; what the other has written is exported."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.console import confirm, note, say


def decide(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """End a split: this node stays master, and every other side follows it. On the master whose side is to stay."""
    from cli.local_node import load, member_broker

    with member_broker(load(context)) as link:
        answer, _ = link.request({"op": "split.decide", "dry": True})
        result = answer["result"]
        if not yes:
            confirm(
                f"{result['problem'].partition(';')[0]}. This node stays master; what the other side has changed in "
                "tables of the master's is exported there (`pmgcm divergence list`) and replaced by what is here."
            )
        answer, _ = link.request({"op": "split.decide", "dry": False})
    say(f"this node is master of epoch {answer['result']['epoch']}")
    note("the other side follows as soon as it is reached; `pmgcm status` shows when it is in step")
