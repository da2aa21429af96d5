"""Retention: what each chain in the journal may forget, and who must resynchronise because of it. Pure, no I/O.

Invariant: a chain forgets a transaction only when every other member is known to be past it, or when a limit forces it
away. A member that a limit overtakes is named in that decision, and in every later one until its position is past the
chain's first one again. A member whose position is not known holds back everything that the limits allow; it is named
only when its position is known.

The positions given for members are those that a power failure cannot take from them again: *applied* positions, or
durable ones when the member's journal is fsynced. The local node is a member like any other. The origin of a chain is
not asked: its own database has what it committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from pmgsync.core.positions import Position

MARK_BYTES = 4 << 20
"""A mark is closed when it has this many bytes; a limit is kept to this precision."""
MARK_SPAN_S = 600.0
"""A mark is closed when its frames were received over this many seconds."""
MAX_STEP_S = 86400.0
"""No two neighbouring receipts count as further apart than this: a wall clock that jumps by years must not age a chain
by years. The price is that a chain which was quiet for days ages more slowly."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one chain may take: bytes of headers and bodies, seconds since receipt."""

    max_bytes: int
    max_age_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A stretch of a chain: it ends at a complete position, has this many bytes, and its newest frame is this old."""

    position: Position
    size: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Held:
    """What is held of a chain: everything after `first` up to `head` (complete positions), as marks in order."""

    first: Position
    head: Position
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Decision:
    """Forget everything up to `trim` (the first position: nothing). The members in `resync` cannot be served now."""

    trim: Position
    resync: frozenset[int]


def decide(
    chains: Mapping[int, Held],
    members: Set[int],
    known: Mapping[int, Mapping[int, Position | None]],
    limits: Limits,
) -> dict[int, Decision]:
    """Return what each chain may forget.

    Args:
        chains: by origin.
        members: every member of the cluster, the local node too; who left is not in it and holds nothing back.
        known: member to origin to the position that the member will not fall behind, None or absent when it is not
            known yet. A position on another incarnation is not a position on this chain: give None, and
            resynchronise that member for its own reason.
        limits: of each chain.
    """
    return {
        origin: _decide(held, [known.get(member, {}).get(origin) for member in receivers], receivers, limits)
        for origin, held in chains.items()
        for receivers in [sorted(members - {origin})]
    }


def _decide(held: Held, positions: Sequence[Position | None], receivers: Sequence[int], limits: Limits) -> Decision:
    needed = held.head
    for position in positions:
        needed = min(needed, held.first if position is None else _floor(position))
    # A position past the head (of a member with more than this journal) or before the first changes nothing.
    trim = max(held.first, needed, _forced(held, limits))
    resync = (
        member
        for member, position in zip(receivers, positions, strict=True)
        if position is not None and _floor(position) < trim
    )
    return Decision(trim, frozenset(resync))


def _floor(position: Position) -> Position:
    """Return the complete position that is surely reached: a half transaction is begun again from its first part."""
    return position if position.complete else Position(max(position.lsn - 1, 0))


def _forced(held: Held, limits: Limits) -> Position:
    """Return the position up to which the limits force frames away."""
    total = sum(mark.size for mark in held.marks)
    forced = held.first
    for mark in held.marks:
        if total <= limits.max_bytes and mark.age_s <= limits.max_age_s:
            break
        forced = mark.position
        total -= mark.size
    return min(forced, held.head)


@dataclass(slots=True)
class _Stretch:
    """A mark in the making; stamps are seconds of a clock that never jumps."""

    end: Position
    size: int
    oldest: float
    newest: float


class Ledger:
    """The bytes and ages of what is held of one chain, by stretches, so that nobody has to ask the disk."""

    def __init__(self) -> None:
        self._stretches: deque[_Stretch] = deque()
        self._parts = 0
        self._parts_since = 0.0

    def add(self, here: Position, size: int, stamp: float) -> None:
        """Count a frame that ends at `here`, has `size` bytes and was received at `stamp`."""
        if not here.complete:
            # A stretch ends where trimming may end, never inside a transaction.
            self._parts_since = self._parts_since if self._parts else stamp
            self._parts += size
            return
        since = self._parts_since if self._parts else stamp
        size, self._parts = size + self._parts, 0
        last = self._stretches[-1] if self._stretches else None
        if last is None or last.size >= MARK_BYTES or stamp - last.oldest >= MARK_SPAN_S:
            self._stretches.append(_Stretch(here, size, since, stamp))
        else:
            last.end, last.size, last.newest = here, last.size + size, max(last.newest, stamp)

    def drop_parts(self) -> None:
        """Forget the parts of a half transaction."""
        self._parts = 0

    def trim(self, upto: Position) -> None:
        """Forget the stretches that end at `upto` or before; one that goes beyond it stays and counts in full."""
        while self._stretches and self._stretches[0].end <= upto:
            self._stretches.popleft()

    def shift(self, seconds: float) -> None:
        """Move every stamp, from the clock they were taken by to the one that is asked from now on."""
        self._parts_since += seconds
        for stretch in self._stretches:
            stretch.oldest += seconds
            stretch.newest += seconds

    @property
    def size(self) -> int:
        """Bytes of headers and bodies; at most a stretch more than is really held."""
        return self._parts + sum(stretch.size for stretch in self._stretches)

    def oldest_age_s(self, now: float) -> float | None:
        """Seconds since the oldest frame was received, None when nothing is held."""
        if self._stretches:
            return max(0.0, now - self._stretches[0].oldest)
        return max(0.0, now - self._parts_since) if self._parts else None

    def marks(self, now: float) -> tuple[Mark, ...]:
        """Return the stretches as marks."""
        return tuple(Mark(item.end, item.size, max(0.0, now - item.newest)) for item in self._stretches)


class WallAge:
    """Turns wall clock stamps in the order of receipt into seconds of a clock that never jumps back, nor far ahead."""

    def __init__(self) -> None:
        self._last: float | None = None
        self.now = 0.0

    def step(self, wall: float) -> float:
        """Return the steady stamp of the next wall clock stamp."""
        if self._last is not None:
            self.now += min(max(wall - self._last, 0.0), MAX_STEP_S)
        self._last = wall
        return self.now
