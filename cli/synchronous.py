"""`pmgcm synchronous`: shows synchronous mode, or sets it for the cluster, on the master."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import note, say, say_json

if TYPE_CHECKING:
    from pmgsync.core.synchronous import Setting

OFF = "off"


def synchronous(
    context: typer.Context,
    slaves: Annotated[
        str | None, typer.Argument(metavar="[K|off]", help="How many slaves a commit waits for; without it: show")
    ] = None,
    degrade: Annotated[
        float | None,
        typer.Option(metavar="S", help="Commits wait at most S seconds for slaves that are away (default: 10)"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Commits wait for as long as slaves are away")] = False,
    visible: Annotated[
        bool, typer.Option("--visible", help="Until slaves can read it, not until it is on their disks")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Have a commit on the master return only when K slaves have it. Without K: show how that stands."""
    from cli.local_node import load, member_broker, read_status
    from cli.status import synchronous_lines

    if slaves is None:
        if degrade is not None or wait or visible:
            raise typer.BadParameter("how many slaves commits are to wait for is missing")
        with member_broker(load(context)) as link:
            status = read_status(link)
        if as_json:
            say_json(status["synchronous"])
        else:
            say("\n".join(synchronous_lines(status)) or "commits on the master do not wait for slaves")
        return
    setting = _setting(slaves, degrade=degrade, wait=wait, visible=visible)
    with member_broker(load(context)) as link:
        link.request({"op": "synchronous.set", "setting": setting.to_map()})
        status = read_status(link)
    if as_json:
        say_json(status["synchronous"])
        return
    say(_told(setting, status["synchronous"]))
    if setting.slaves:
        note("`pmgcm status` shows how it stands; it is the whole server of the master whose commits wait")


def _setting(slaves: str, *, degrade: float | None, wait: bool, visible: bool) -> Setting:
    """Return the setting that the arguments ask for.

    Raises:
        typer.BadParameter: when they make no sense.
    """
    from pmgsync.core.synchronous import LONGEST_PATIENCE_S, MAX_SLAVES, PATIENCE_S, Setting

    if slaves == OFF:
        if degrade is not None or wait or visible:
            raise typer.BadParameter(f"with {OFF!r} nothing else can be said")
        return Setting()
    if not slaves.isdecimal() or not 0 < int(slaves) <= MAX_SLAVES:
        raise typer.BadParameter(f"{slaves!r} is no number of slaves, expected 1 to {MAX_SLAVES}, or {OFF!r}")
    if wait and degrade is not None:
        raise typer.BadParameter("--wait and --degrade exclude each other")
    seconds = PATIENCE_S if degrade is None else degrade
    if not 0.1 <= seconds <= LONGEST_PATIENCE_S:
        raise typer.BadParameter(f"--degrade {seconds:g}: expected seconds, 0.1 to {LONGEST_PATIENCE_S:g}")
    return Setting(int(slaves), "visible" if visible else "durable", None if wait else round(seconds * 1000))


def _told(setting: Setting, found: Mapping[str, Any]) -> str:
    if not setting.slaves:
        return "commits on the master do not wait for slaves any more"
    state = "" if found["in_force"] else ", as soon as so many are in step"
    return f"commits on the master wait for {setting.slaves} slave{'s' if setting.slaves > 1 else ''}{state}"
