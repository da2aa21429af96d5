"""How far a receiver is behind a chain in seconds: since when the head has been beyond it. Pure; no clock is read."""

from __future__ import annotations

from array import array

SAMPLE_S = 0.1
EXACT = 0.02
"""What is older is known less exactly: a lag is told too long by about this share of it at most."""
THIN_AT = 1_000
"""Samples at which those that are closer together than that are put together; a day of a head that never rests has
half as many then."""


class HeadClock:
    """The recent history of one chain's head, on the observer's monotonic clock."""

    def __init__(self) -> None:
        # Arrays, not tuples in a list: a broker has one of these for each chain, and they fill up under load.
        self._times = array("d")
        self._lsns = array("Q")
        self._incarnation = 0

    @property
    def head(self) -> int:
        """The newest LSN noted, 0 before the first."""
        return self._lsns[-1] if self._lsns else 0

    def note(self, now: float, incarnation: int, lsn: int) -> None:
        """Note that the head stands at an LSN; heads that go back in the same incarnation are stale news."""
        if incarnation != self._incarnation:
            self._times, self._lsns = array("d"), array("Q")
            self._incarnation = incarnation
        if self._lsns and lsn <= self._lsns[-1]:
            return
        if len(self._times) > 1 and now - self._times[-2] < SAMPLE_S:
            # Keep the older time with the newer LSN out: a lag may be told up to a sample too long, never too short.
            self._lsns[-1] = lsn
            return
        self._times.append(now)
        self._lsns.append(lsn)
        if len(self._times) > THIN_AT:
            self._thin(now)

    def _thin(self, now: float) -> None:
        times, lsns = array("d"), array("Q")
        for noted, lsn in zip(self._times, self._lsns, strict=True):
            if times and noted - times[-1] < (now - noted) * EXACT:
                lsns[-1] = lsn  # too long, never too short
            else:
                times.append(noted)
                lsns.append(lsn)
        self._times, self._lsns = times, lsns

    def lag_s(self, now: float, applied: int) -> float:
        """Return for how many seconds there has been something that a receiver at `applied` has not got."""
        if applied >= self.head:
            return 0.0
        behind_since = now
        for noted, lsn in zip(reversed(self._times), reversed(self._lsns), strict=True):
            if lsn <= applied:
                break
            behind_since = noted
        return max(0.0, now - behind_since)

    def lag_bytes(self, applied: int) -> int:
        """Return how many bytes of WAL lie between a receiver and the head."""
        return max(0, self.head - applied)
