"""Heartbeats: what a node says of itself every second, packed, read and checked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from broker.heartbeats.conflicts import read_counters
from pmgsync.core.nesting import check_nesting
from pmgsync.core.positions import MAX_LSN, Position
from pmgsync.core.trees import read_action_reports, read_tree_reports
from pmgsync.errors import ProtocolError
from pmgsync.subscription import MAX_LEVEL

VERSION = 1
MAX_BYTES = 256 << 10
MAX_ALERTS = 100
ALERT_BYTES = 128 << 10
"""Room for the alerts of all workers. The first ones that fit are sent: a heartbeat that is too long is refused."""
DOWN_AFTER_S = 3.5
"""A node whose newest heartbeat is older is down."""


@dataclass(frozen=True, slots=True)
class HeldChain:
    """A chain in a node's journal: the position its oldest frame follows, and its head."""

    incarnation: int
    first: Position
    head: Position


@dataclass(frozen=True, slots=True)
class OwnChain:
    """What a node says of its own chain; `snapshot` as in PROTOCOL.md, section 6."""

    incarnation: int
    start: int
    snapshot: bool
    watermark: int


@dataclass(frozen=True, slots=True)
class Applied:
    """How far a database has applied a chain.

    Attributes:
        position: up to here no crash takes it back.
        visible: up to here it can be read; not before `position`.
        whole: False while changes of tables are left out, which are fetched later.
    """

    incarnation: int
    position: Position
    visible: Position
    whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One heartbeat; `received` is on the receiver's monotonic clock."""

    cluster: bytes
    cid: int
    epoch: int
    serial: int
    master: int
    time_us: int
    uptime_s: int
    load1: float
    mem_pct: float
    disk_pct: float
    state: str
    error: str
    alerts: tuple[Mapping[str, str], ...]
    chains: Mapping[int, HeldChain]
    own: OwnChain | None
    applied: Mapping[int, Applied]
    conflicts: Mapping[str, int] = field(default_factory=dict)
    trees: tuple[Mapping[str, Any], ...] = ()
    over: frozenset[int] = frozenset()
    level: str = ""
    actions: tuple[Mapping[str, Any], ...] = ()
    received: float = field(default_factory=time.monotonic)

    def pack(self) -> bytes:
        """Return the form that travels."""
        data = {
            "v": VERSION,
            "cluster": self.cluster,
            "cid": self.cid,
            "epoch": self.epoch,
            "serial": self.serial,
            "master": self.master,
            "time": self.time_us,
            "uptime_s": self.uptime_s,
            "load1": self.load1,
            "mem_pct": self.mem_pct,
            "disk_pct": self.disk_pct,
            "state": self.state,
            "error": self.error,
            "alerts": _fitting(self.alerts),
            "chains": {origin: [chain.incarnation, *chain.first, *chain.head] for origin, chain in self.chains.items()},
            "own": {
                "incarnation": self.own.incarnation,
                "start": self.own.start,
                "snapshot": self.own.snapshot,
                "watermark": self.own.watermark,
            }
            if self.own
            else None,
            **pack_applied(self.applied),
            "conflicts": dict(self.conflicts),
            "trees": [dict(tree) for tree in self.trees],
            "over": sorted(self.over),
            "level": self.level,
            "actions": [dict(action) for action in self.actions],
        }
        return msgpack.packb(data, use_bin_type=True)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> Heartbeat:
        """Return the heartbeat in bytes from the network.

        Raises:
            ProtocolError: when it is not what PROTOCOL.md, section 6, says.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"a heartbeat has {len(data)} bytes, expected at most {MAX_BYTES}")
        try:
            raw = msgpack.unpackb(data, raw=False, strict_map_key=False, max_ext_len=0)
            check_nesting(raw)
            if raw["v"] != VERSION:
                raise ProtocolError(
                    f"a heartbeat has version {raw['v']!r:.20}, this node reads version {VERSION}",
                    hint="upgrade the node that runs the older pmgsync",
                )
            own = raw["own"]
            return cls(
                cluster=_typed(raw["cluster"], bytes),
                cid=_typed(raw["cid"], int),
                epoch=_typed(raw["epoch"], int),
                serial=_typed(raw["serial"], int),
                master=_typed(raw.get("master", 0), int),
                time_us=_typed(raw["time"], int),
                uptime_s=_typed(raw["uptime_s"], int),
                load1=float(raw["load1"]),
                mem_pct=float(raw["mem_pct"]),
                disk_pct=float(raw["disk_pct"]),
                state=_typed(raw["state"], str)[:20],
                error=_typed(raw["error"], str)[:2000],
                alerts=tuple(
                    {str(key)[:40]: str(value)[:2000] for key, value in alert.items()}
                    for alert in raw["alerts"][:MAX_ALERTS]
                ),
                chains={_cid(key): _held(value) for key, value in raw["chains"].items()},
                own=None
                if own is None
                else OwnChain(
                    incarnation=_number(own["incarnation"]),
                    start=_number(own["start"]),
                    snapshot=_typed(own["snapshot"], bool),
                    watermark=_number(own["watermark"]),
                ),
                applied=parse_applied(raw["applied"], raw.get("visible"), raw.get("partial")),
                conflicts=read_counters(raw.get("conflicts")),
                trees=tuple(read_tree_reports(raw.get("trees"))),
                over=frozenset(_cid(cid) for cid in raw.get("over", [])),
                level=_typed(raw.get("level", ""), str)[:MAX_LEVEL],
                actions=tuple(read_action_reports(raw.get("actions"))),
            )
        except ProtocolError:
            raise
        except Exception as error:  # any shape may come
            raise ProtocolError(f"a heartbeat is malformed ({type(error).__name__}: {error})") from error


def _fitting(alerts: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the alerts that a heartbeat has room for."""
    found, room = [], ALERT_BYTES
    for alert in alerts[:MAX_ALERTS]:
        room -= len(msgpack.packb(dict(alert)))
        if room < 0:
            break
        found.append(dict(alert))
    return found


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is not {kind.__name__}")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_LSN:
        raise ValueError(f"{value!r:.40} is not an unsigned 63-bit integer")
    return value


def _cid(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{value!r:.40} is not a CID")
    return value


def _held(value: Any) -> HeldChain:
    incarnation, first_lsn, first_part, head_lsn, head_part = value
    return HeldChain(
        _number(incarnation), Position.parse([first_lsn, first_part]), Position.parse([head_lsn, head_part])
    )


def pack_applied(applied: Mapping[int, Applied]) -> dict[str, Any]:
    """Return the keys `applied`, `visible` and `partial` of a heartbeat or an ack."""
    ahead = {origin: done for origin, done in applied.items() if done.visible != done.position}
    return {
        "applied": {origin: [done.incarnation, *done.position] for origin, done in applied.items()},
        "visible": {origin: [done.incarnation, *done.visible] for origin, done in ahead.items()},
        "partial": [origin for origin, done in applied.items() if not done.whole],
    }


def parse_applied(value: Any, visible: Any, partial: Any = None) -> dict[int, Applied]:
    """Return the vector in a heartbeat or an ack.

    Args:
        value, visible: the keys `applied` and `visible`; what is missing in the latter is as far as it is applied.
        partial: the key `partial`; None: nothing is left out.

    Raises:
        ProtocolError, TypeError, ValueError, AttributeError: when it is malformed.
    """
    ahead = {key: _place(place) for key, place in (visible or {}).items()}
    left_out = {_cid(key) for key in partial or ()}
    found = {}
    for key, place in value.items():
        incarnation, position = _place(place)
        of, beyond = ahead.get(key, (incarnation, position))
        seen = max(position, beyond) if of == incarnation else position
        found[_cid(key)] = Applied(incarnation, position, seen, key not in left_out)
    return found


def _place(value: Any) -> tuple[int, Position]:
    incarnation, lsn, part = value
    return _number(incarnation), Position.parse([lsn, part])
