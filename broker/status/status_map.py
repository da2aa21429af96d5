"""The status map: every member as this broker sees it, derived from heartbeats, acks and chain heads. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from broker.heartbeats.heartbeat import Applied, Heartbeat
from broker.heartbeats.lag import HeadClock
from pmgsync.core.membership import ClusterDocument, Member
from pmgsync.core.positions import Position, format_lsn

BEHIND_S = 5.0
"""A member that lags more than this is shown as synchronising."""


@dataclass(frozen=True, slots=True)
class View:
    """What a broker knows of one member: its newest heartbeat (None: none yet), that heartbeat's age in seconds,
    its applied vector (may be newer than the heartbeat's), the link's own trouble, how far its clock seems to be
    ahead of this node's (None: not known), and what was counted of the frames that it sent (None: this node)."""

    heartbeat: Heartbeat | None
    age_s: float
    applied: Mapping[int, Applied]
    problem: str
    clock_skew_s: float | None
    received: Mapping[str, int] | None = None
    joining: Mapping[str, Any] | None = None


def status_map(
    document: ClusterDocument,
    views: Mapping[int, View],
    clocks: Mapping[int, HeadClock],
    *,
    now: float,
    down_after_s: float,
) -> dict[str, Any]:
    """Return the map that `pmgcm status --json` prints; its contract is in README.md."""
    nodes = [_node(member, views, clocks, document, now=now, down_after_s=down_after_s) for member in document.members]
    return {"cluster": document.name, "epoch": document.epoch, "master": document.master, "nodes": nodes}


def _node(
    member: Member,
    views: Mapping[int, View],
    clocks: Mapping[int, HeadClock],
    document: ClusterDocument,
    *,
    now: float,
    down_after_s: float,
) -> dict[str, Any]:
    view = views[member.cid]
    heartbeat = view.heartbeat
    error, state = "", "A"
    if member.state == "joining":
        state = "S"
    elif heartbeat is None:
        error = view.problem or "nothing was heard from it yet"
    elif view.age_s > down_after_s:
        error = f"nothing heard for {view.age_s:.0f} s" + (f": {view.problem}" if view.problem else "")
    elif heartbeat.error:
        error = heartbeat.error
    lag_s, lag_bytes, unknown = 0.0, 0, []
    positions: dict[str, str] = {}
    visible: dict[str, str] = {}
    for origin, clock in sorted(clocks.items()):
        if origin == member.cid or document.member(origin) is None or member.role == "witness":
            continue
        done = view.applied.get(origin)
        if done is None:
            unknown.append(origin)
            continue
        lsn = _complete(done.position)
        positions[str(origin)] = format_lsn(lsn)
        visible[str(origin)] = format_lsn(max(lsn, _complete(done.visible)))
        lag_s = max(lag_s, clock.lag_s(now, lsn))
        lag_bytes += clock.lag_bytes(lsn)
    head = clocks[member.cid].head if member.cid in clocks else 0
    if head:
        positions[str(member.cid)] = visible[str(member.cid)] = format_lsn(head)
    if member.state == "joining":
        unknown = []
    elif error:
        state = "ERROR"
    elif unknown or lag_s > BEHIND_S or (heartbeat is not None and heartbeat.state != "A"):
        state = "S"
    return {
        "cid": member.cid,
        "name": member.name,
        "ip": member.address,
        "role": member.role,
        "state": state,
        "error": error or None,
        "uptime_s": heartbeat.uptime_s if heartbeat else None,
        "load1": heartbeat.load1 if heartbeat else None,
        "mem_pct": heartbeat.mem_pct if heartbeat else None,
        "disk_pct": heartbeat.disk_pct if heartbeat else None,
        "positions": positions,
        "visible": visible,
        "held": {str(origin): format_lsn(_complete(chain.head)) for origin, chain in sorted(heartbeat.chains.items())}
        if heartbeat
        else {},
        "head": format_lsn(head) if head else None,
        "watermark": format_lsn(heartbeat.own.watermark) if heartbeat and heartbeat.own else None,
        "lag_bytes": lag_bytes,
        "lag_s": round(lag_s, 3),
        "waiting_for": [f"first position of node {origin}" for origin in unknown],
        "level": _level(member, view) or None,
        "alerts": [*map(dict, heartbeat.alerts if heartbeat else ()), *_levels(member, views, document)],
        "conflicts": dict(heartbeat.conflicts) if heartbeat else {},
        "trees": [dict(tree) for tree in heartbeat.trees] if heartbeat else [],
        "actions": [dict(action) for action in heartbeat.actions] if heartbeat else [],
        "clock_skew_s": None if view.clock_skew_s is None else round(view.clock_skew_s, 3),
        "joining": dict(view.joining or {"phase": "", "bytes": 0, "rows": 0, "bytes_total": 0})
        if member.state == "joining"
        else None,
        "received": None if view.received is None else dict(view.received),
        "epoch": heartbeat.epoch if heartbeat else None,
        "master": heartbeat.master or None if heartbeat else None,
        "heartbeat_age_s": round(view.age_s, 3) if heartbeat else None,
    }


def _level(member: Member, view: View) -> str:
    """Return the subscription level: as the node says it now, or as the document has it."""
    return (view.heartbeat.level if view.heartbeat else "") or member.level


def _levels(member: Member, views: Mapping[int, View], document: ClusterDocument) -> list[dict[str, str]]:
    """Return an alert when a node's level is another than the master's."""
    master = document.member(document.master)
    assert master is not None
    theirs, level = _level(master, views[master.cid]), _level(member, views[member.cid])
    if member.role == "witness" or level == theirs or not level or not theirs:
        return []
    text = f"its subscription level is {level!r}, the master's is {theirs!r}: all members need the same"
    return [{"kind": "subscription", "text": text}]


def _complete(position: Position) -> int:
    """Return the LSN up to which whole transactions are in: one that is half in cannot be read there."""
    return position.lsn if position.complete else position.lsn - 1
