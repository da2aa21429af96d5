"""`pmgcm join-cmd`: on the master, prints the line that lets one new node join."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from cli.console import note, say, say_json
from cli.witness import SUGGESTION
from pmgsync.errors import PmgsyncError

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def join_cmd(
    context: typer.Context,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long the token is good for: 90s, 30m, 1h, 1d")] = "1h",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Print the `pmgcm join` line for a new node, with a token that can be used once. On the master only."""
    from cli.local_node import load, member_broker
    from pmgsync.core.membership import SignedDocument, format_fingerprint, no_cluster

    seconds = parse_ttl(ttl)
    with member_broker(load(context)) as link:
        welcome, parts = link.request({"op": "hello", "worker": "cli"})
        if not welcome["cid"] or not parts:
            raise no_cluster()
        document = SignedDocument.unpack(parts[0]).document
        master = document.member(welcome["cid"])
        assert master is not None
        answer, _ = link.request({"op": "token", "ttl_s": seconds})
    fingerprint, token = format_fingerprint(master.curve_key), answer["token"]
    line = f"pmgcm join {master.address} --port {master.join} --fingerprint {fingerprint} --token {token}"
    if as_json:
        say_json(
            {
                "command": line,
                "address": master.address,
                "port": master.join,
                "fingerprint": fingerprint,
                "token": token,
                "expires_s": answer["expires_s"],
            }
        )
    else:
        note(f"run this on the new node within {ttl}; it works once:")
        if document.fence_wanted == "lease" and len(document.voters) == 2:
            note(f"note: {SUGGESTION} (the same line with --witness)")
        say(line)


def parse_ttl(text: str) -> int:
    """Return the seconds in a time span such as 90s, 30m, 1h or 1d.

    Raises:
        PmgsyncError: when it is not one.
    """
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text.strip().lower())
    if not match or not int(match[1]):
        raise PmgsyncError(f"--ttl is {text!r:.40}, expected a time span such as 90s, 30m, 1h or 1d")
    return int(match[1]) * _UNITS[match[2]]
