"""What a receiver does with the next frame of a chain: the rules of PROTOCOL.md, section 2. Pure, no I/O.

Invariant: after any sequence of frames, in any order and with any repetition, a receiver that follows these verdicts
holds the transactions of the chain up to its head, in order, each once, without a hole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from pmgsync.core.frames import Header
from pmgsync.core.positions import Position


class Verdict(Enum):
    """What to do with a frame."""

    __hash__ = object.__hash__  # each is one object; Enum's own is written in Python, and used for every frame
    FITS = "fits"
    DUPLICATE = "duplicate"
    GAP = "gap"
    BEGIN_AGAIN = "begin again"
    """Drop the parts held of the transaction, then take the frame."""
    DROP_PARTS = "drop parts"
    """Drop the parts held of the transaction and ask for a replay from the last complete position."""
    OTHER_CHAIN = "other chain"


@dataclass(frozen=True, slots=True)
class ChainHead:
    """Where a receiver stands on a chain.

    Attributes:
        position: the end of the newest frame held.
        complete: the newest complete position held; equal to `position` unless a transaction is half in.
        attempt: the run of capture that the newest part came from; 0 when position is complete.
    """

    origin: int
    incarnation: int
    position: Position
    complete: Position
    attempt: int = 0

    @classmethod
    def at(cls, origin: int, incarnation: int, position: Position) -> ChainHead:
        """Return the head of a receiver that stands at a complete position."""
        assert position.complete
        return cls(origin, incarnation, position, position)

    def judge(self, header: Header) -> Verdict:
        """Return what to do with a frame that has this header."""
        if header.origin != self.origin or header.incarnation != self.incarnation:
            return Verdict.OTHER_CHAIN
        if self.position.complete:
            if header.here <= self.position:
                return Verdict.DUPLICATE
            return Verdict.FITS if header.prev <= self.position else Verdict.GAP
        if header.here <= self.complete:
            return Verdict.DUPLICATE
        if header.attempt == self.attempt:
            if header.here <= self.position:
                return Verdict.DUPLICATE
            return Verdict.FITS if header.prev == self.position else Verdict.GAP
        if header.prev.complete:
            # Another run of capture: whatever it sends from a complete position replaces the half transaction.
            return Verdict.BEGIN_AGAIN if header.prev <= self.complete else Verdict.GAP
        return Verdict.DROP_PARTS

    def advanced(self, header: Header) -> ChainHead:
        """Return the head after a frame that fits, or that begins again, was taken."""
        if header.here.complete:
            return ChainHead(self.origin, self.incarnation, header.here, header.here)
        complete = header.prev if header.prev.complete and header.prev > self.complete else self.complete
        return replace(self, position=header.here, complete=complete, attempt=header.attempt)

    def without_parts(self) -> ChainHead:
        """Return the head after the parts of a half transaction were dropped."""
        return replace(self, position=self.complete, attempt=0)
