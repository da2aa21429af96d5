"""Synchronous mode: up to where commits on the master may return, from what slaves have acknowledged. Pure.

Invariants:
1. While commits are held, none returns before as many slaves as the setting says have its transaction.
2. What is confirmed never passes what the master's own journal has on disk, held or not.
3. What may be confirmed never goes back.
4. Only what a member has said in the epoch in force, under its master, counts: whoever follows another master passes
   over transactions that do not count there, and its position moves all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pmgsync.core.positions import LAST, MAX_LSN, ZERO, Position
from pmgsync.errors import ProtocolError

LEVELS = ("durable", "visible")
PATIENCE_S = 10.0
LONGEST_PATIENCE_S = 3_600.0
MAX_SLAVES = 63
IN_STEP_S = 0.5
"""A slave that lacks nothing older than this is in step: the mode comes in force, or comes back, with it."""
MAX_ENDS = 4_096
"""Ends of frames that are remembered apart; beyond it, fewer: commits then return a little later, never too early."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the cluster is set to.

    Attributes:
        slaves: how many must have a transaction before its commit returns; 0: the mode is off.
        level: `durable`: no crash takes it back there; `visible`: it can be read there.
        patience_ms: after so long without them commits return without them; None: they wait.
    """

    slaves: int = 0
    level: str = "durable"
    patience_ms: int | None = round(PATIENCE_S * 1000)

    @property
    def patience_s(self) -> float | None:
        """The patience in seconds."""
        return None if self.patience_ms is None else self.patience_ms / 1000

    def to_map(self) -> dict[str, Any]:
        return {"slaves": self.slaves, "level": self.level, "patience_ms": self.patience_ms}

    @classmethod
    def from_map(cls, data: object) -> Setting:
        """Return the setting that a map describes.

        Raises:
            ProtocolError: when it is not what PROTOCOL.md, section 7, says.
        """
        match data:
            case {"slaves": int(slaves), "level": str(level), "patience_ms": (int() | None) as patience_ms} if (
                bool not in {type(slaves), type(patience_ms)}
                and 0 <= slaves <= MAX_SLAVES
                and level in LEVELS
                and (patience_ms is None or 0 < patience_ms <= LONGEST_PATIENCE_S * 1000)
            ):
                return cls(slaves, level, patience_ms)
        raise ProtocolError(f"a setting of synchronous mode is {data!r:.120}")


OFF = Setting()


@dataclass(frozen=True, slots=True)
class Said:
    """What a member last said of the master's chain.

    Attributes:
        epoch, master: of the document that it held when it said so.
        incarnation: of the chain.
        durable, visible: up to where it has applied it.
        whole: False while it leaves out changes of tables, which are fetched later.
    """

    epoch: int
    master: int
    incarnation: int
    durable: Position
    visible: Position
    whole: bool = True


def counted(said: Said, level: str, *, epoch: int, master: int, incarnation: int) -> Position | None:
    """Return up to where a member's word counts; None: not at all."""
    if (said.epoch, said.master, said.incarnation) != (epoch, master, incarnation):
        return None
    return said.visible if level == "visible" else said.durable


def reached(positions: Iterable[Position], slaves: int) -> Position:
    """Return the greatest position that as many slaves have reached; `ZERO` when there are not as many."""
    if slaves < 1:
        raise ValueError("nobody is asked for")
    ranked = sorted(positions, reverse=True)
    return ranked[slaves - 1] if len(ranked) >= slaves else ZERO


def acknowledged(found: Mapping[int, Position], whole: Collection[int], slaves: int) -> Position:
    """Return the greatest position that as many slaves have acknowledged.

    One that leaves out changes of a stale table counts only while there are not enough others. Then it must: to fetch
    the table it needs a snapshot of the master, which is not to be had before every commit that waits has ended.

    Args:
        found: up to where each slave's word counts.
        whole: those that are reached and leave out nothing.
    """
    firm = [position for cid, position in found.items() if cid in whole]
    return reached(firm if len(firm) >= slaves else found.values(), slaves)


def is_due(setting: Setting, *, in_force: bool, named: int, in_step: int) -> bool | None:
    """Say whether the mode is to be in force, None when it is as it should be.

    It comes in force when enough slaves are in step, so that switching it on stops nobody, and stays in force whatever
    becomes of them; only when the document no longer names enough of them there is nothing to wait for.

    Args:
        named: slaves in the document whose copy is in place.
        in_step: those of them that are in step.
    """
    if in_force:
        return None if 0 < setting.slaves <= named else False
    return True if setting.slaves and in_step >= setting.slaves else None


@dataclass(frozen=True, slots=True)
class Patience:
    """Whether commits are held, or return without slaves because these were away for too long.

    Attributes:
        degraded: they return without.
        missing_since: since when enough slaves are not in step; None: they are.
    """

    degraded: bool = False
    missing_since: float | None = None

    def looked(self, now: float, *, in_step: bool, waiting_s: float, patience_s: float | None) -> Patience:
        """Return what it is after a look.

        Args:
            in_step: enough slaves are reached and in step.
            waiting_s: for how long the oldest transaction has been waiting that not enough slaves have.
        """
        since = None if in_step else now if self.missing_since is None else self.missing_since
        if patience_s is None:
            return Patience(False, since)
        if self.degraded:
            return Patience(not in_step, since)
        missing_s = 0.0 if since is None else now - since
        return Patience(waiting_s > patience_s or (missing_s > patience_s), since)


class Ends:
    """Where the newest frames of the own chain end in the WAL: a commit returns when the end of its record is
    confirmed, and members acknowledge the record's begin.
    """

    def __init__(self, position: Position, whole: int) -> None:
        """Begin.

        Args:
            position: the newest frame's end, complete.
            whole: LSN below which nothing is to come that is not in the chain up to there.
        """
        self._ends = deque([(position, whole)])

    @property
    def newest(self) -> Position:
        """The end of the newest frame."""
        return self._ends[-1][0]

    def sent(self, position: Position, end: int) -> None:
        """Note a frame that holds everything below `end`, and earlier ones; parts of a transaction say nothing yet, nor
        does what was noted before.
        """
        if not position.complete or position <= self._ends[-1][0]:
            return
        if len(self._ends) >= MAX_ENDS:
            newest = self._ends[-1]
            self._ends = deque(list(self._ends)[::2])
            if self._ends[-1] != newest:
                self._ends.append(newest)
        self._ends.append((position, max(end, self._ends[-1][1])))

    def passed(self, lsn: int) -> None:
        """Note that nothing below an LSN is to come that was not sent."""
        position, end = self._ends[-1]
        self._ends[-1] = (position, max(end, lsn))

    def upto(self, position: Position) -> int:
        """Return the LSN up to which whoever is at a position has everything, 0 when not known; forgets what was
        before.
        """
        while len(self._ends) > 1 and self._ends[1][0] <= position:
            self._ends.popleft()
        newest, end = self._ends[0]
        return end if newest <= position else 0


EVERYTHING = Position(MAX_LSN, LAST)
"""What is waited for when commits are not held: beyond all that can come."""


def confirmable(position: Position, ends: Ends, *, safe: int, confirmed: int) -> int:
    """Return the LSN that capture may confirm.

    Args:
        position: what enough slaves have; `EVERYTHING` when commits are not held.
        safe: the LSN below which everything is on the journal's disk.
        confirmed: what was confirmed last.
    """
    end = ends.upto(position)
    return max(confirmed, safe if position == EVERYTHING else min(end, safe))


def in_step(waiting_s: Mapping[int, float]) -> frozenset[int]:
    """Return the slaves that lack nothing that is older than `IN_STEP_S`.

    Args:
        waiting_s: for how long there has been something that a slave lacks, for each that is reached.
    """
    return frozenset(cid for cid, waits_s in waiting_s.items() if waits_s < IN_STEP_S)
