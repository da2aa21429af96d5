"""`pmgcm wait`: returns once every member has applied what had been committed anywhere when it was called."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, amount, note, printable, say, say_json
from pmgsync.core.positions import parse_lsn
from pmgsync.errors import PmgsyncError, UnreachableError

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.wire.link import BrokerLink

DEFAULT_TIMEOUT_S = 60.0
POLL_S = 0.1
BARRIER_ANSWER_S = 5.0


@dataclass(frozen=True)
class Behind:
    """A member that has not applied what it should have.

    Attributes:
        cid: the member.
        origin: the chain it is behind on.
        reason: why, in words; "" when it is only not there yet.
        lag_bytes: bytes of the origin's WAL that it lacks at most, None when that is not known.
    """

    cid: int
    origin: int
    reason: str = ""
    lag_bytes: int | None = None

    def to_map(self) -> dict[str, Any]:
        return {"cid": self.cid, "origin": self.origin, "lag_bytes": self.lag_bytes, "reason": self.reason or None}


@dataclass
class Goal:
    """What every member must have applied, found out as status maps come in. It decides; it does no I/O.

    Everything committed on an origin before the call lies at or below its barrier (an LSN). The origin's chain is
    known to hold all of that once its watermark or its head has reached the barrier; from then on a member has all of
    it when its position has reached the barrier, or the head as it stood then if that was lower. Barriers and needs
    are fixed once known, so whatever is committed later does not move the goal.
    """

    barriers: dict[int, int] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    _needs: dict[int, int] = field(default_factory=dict)

    def barrier(self, origin: int, lsn: int) -> None:
        """Note an origin's barrier; only the first counts."""
        self.barriers.setdefault(origin, lsn)
        self.problems.pop(origin, None)

    def missing(self, status: Mapping[str, Any]) -> list[int]:
        """Return the members whose barrier is still to be asked for."""
        return [cid for cid in _databases(status) if cid not in self.barriers]

    def behind(self, status: Mapping[str, Any]) -> list[Behind]:
        """Return who has not got there, by a status map; nobody means done."""
        nodes = _databases(status)
        found = []
        for origin, node in nodes.items():
            need = self._need(origin, node)
            if need is None:
                found.append(Behind(origin, origin, self._reason(origin, node)))
                continue
            found += [lag for cid, member in nodes.items() if (lag := self._lag(cid, member, origin, need)) is not None]
        return found

    def _need(self, origin: int, node: Mapping[str, Any]) -> int | None:
        if origin not in self._needs and origin in self.barriers:
            barrier, head, watermark = self.barriers[origin], _lsn(node["head"]), _lsn(node.get("watermark"))
            if max(head, watermark) >= barrier:
                self._needs[origin] = min(head, barrier)
        return self._needs.get(origin)

    def _reason(self, origin: int, node: Mapping[str, Any]) -> str:
        if node["error"]:
            return str(node["error"])
        if origin in self.barriers:
            return "its own changes are not all published yet"
        return self.problems.get(origin, "it was not asked yet")

    @staticmethod
    def _lag(cid: int, member: Mapping[str, Any], origin: int, need: int) -> Behind | None:
        if cid == origin or need == 0:
            return None
        position = member["positions"].get(str(origin))
        reason = str(member["error"] or "")
        if position is None:
            return Behind(cid, origin, reason or "it has not begun with that chain")
        lag = need - _lsn(position)
        return Behind(cid, origin, reason, lag) if lag > 0 else None


def _databases(status: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the nodes of a status map by CID, without witnesses: they apply nothing."""
    return {node["cid"]: node for node in status["nodes"] if node["role"] != "witness"}


def _lsn(text: str | None) -> int:
    return parse_lsn(text) if text else 0


def wait(
    context: typer.Context,
    timeout: Annotated[float, typer.Option(min=0.0, metavar="S", help="Give up after so many seconds")] = (
        DEFAULT_TIMEOUT_S
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Wait until every member has applied all that is committed now, on any node; exit code 1 after the time-out."""
    from cli.local_node import cluster_defined, load
    from pmgsync.core.membership import no_cluster

    config = load(context)
    if not cluster_defined(config):
        raise no_cluster()
    begun = time.monotonic()
    behind, names = await_everyone(config, begun + timeout)
    waited = time.monotonic() - begun
    if as_json:
        entries = [{**lag.to_map(), "name": names.get(lag.cid)} for lag in behind]
        say_json({"done": not behind, "waited_s": round(waited, 3), "behind": entries})
    elif behind:
        note(f"error: not everything was applied everywhere within {timeout:g} s")
        for lag in behind:
            note(f"  {_sentence(lag, names)}")
    else:
        say(f"every member has applied everything that was committed ({waited:.1f} s)")
    if behind:
        raise CommandFailedError


def await_everyone(config: NodeConfig, deadline: float) -> tuple[list[Behind], dict[int, str]]:
    """Poll until nobody is behind or the time is over; returns who is behind then, and the members' names.

    Raises:
        PmgsyncError: when the broker of this node never answered.
    """
    from cli.local_node import member_broker, read_status

    goal, names, behind = Goal(), dict[int, str](), list[Behind]()
    seen = False
    while True:
        try:
            with member_broker(config) as link:
                while True:
                    status = read_status(link)
                    names = {node["cid"]: node["name"] for node in status["nodes"]}
                    seen = True
                    for cid in goal.missing(status):
                        _ask_barrier(link, goal, cid, deadline)
                    # After the barriers: what this map says of chains must not be older than they are.
                    behind = goal.behind(read_status(link))
                    if not behind or time.monotonic() >= deadline:
                        return behind, names
                    time.sleep(POLL_S)
        except UnreachableError:
            # The broker may be restarting; without ever having answered there is nothing to wait for.
            if not seen or time.monotonic() >= deadline:
                raise
            time.sleep(POLL_S)


def _ask_barrier(link: BrokerLink, goal: Goal, cid: int, deadline: float) -> None:
    silence = max(0.5, min(BARRIER_ANSWER_S, deadline - time.monotonic()))
    try:
        for message, _ in link.call("barrier", {}, target=cid, silence_s=silence):
            if message["op"] == "done":
                goal.barrier(cid, int(message["result"]["lsn"]))
    except PmgsyncError as error:
        goal.problems[cid] = error.message


def _sentence(lag: Behind, names: Mapping[int, str]) -> str:
    who = f"{names.get(lag.cid, '?')}({lag.cid})"
    whom = f"{names.get(lag.origin, '?')}({lag.origin})"
    what = f"{who} could not be asked what it has committed" if lag.cid == lag.origin else f"{who} is behind {whom}"
    if lag.lag_bytes is not None:
        what += f" by {amount(lag.lag_bytes)} of WAL"
    return printable(what + (f": {lag.reason}" if lag.reason else ""))
