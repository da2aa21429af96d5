"""Positions on a chain: a commit LSN of the origin and a part of that transaction. Pure values, no I/O."""

from __future__ import annotations

from typing import NamedTuple

from pmgsync.errors import ProtocolError

LAST = 0xFFFFFFFF
"""The part number of a transaction's last part, and of every transaction that has only one."""

MAX_LSN = (1 << 63) - 1
"""Largest LSN that is accepted; SQLite keeps 63 bits, and a WAL of 8 EiB is not seen."""


def format_lsn(lsn: int) -> str:
    """Return an LSN as PostgreSQL writes it, for example 0/15D4F68."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Return the number behind PostgreSQL's text form of an LSN.

    Raises:
        ProtocolError: when the text is not two hexadecimal numbers of at most 32 bits with a slash between.
    """
    high, slash, low = text.partition("/")
    try:
        high_number, low_number = int(high, 16), int(low, 16)
    except ValueError:
        slash = ""
        high_number = low_number = 0
    if not slash or not 0 <= high_number <= MAX_LSN >> 32 or not 0 <= low_number <= 0xFFFFFFFF:
        raise ProtocolError(f"{text!r} is not an LSN, expected two hexadecimal numbers such as 0/15D4F68")
    return high_number << 32 | low_number


class Position(NamedTuple):
    """A place on a chain, ordered by LSN, then part. `Position(lsn, LAST)` is a complete position."""

    lsn: int
    part: int = LAST

    @property
    def complete(self) -> bool:
        """True when no transaction is half in."""
        return self.part == LAST

    def __str__(self) -> str:
        return format_lsn(self.lsn) if self.complete else f"{format_lsn(self.lsn)}.{self.part}"

    @classmethod
    def parse(cls, value: object) -> Position:
        """Return the position in a decoded `[lsn, part]`.

        Raises:
            ProtocolError: when it is anything else.
        """
        if isinstance(value, (list, tuple)) and len(value) == 2:
            lsn, part = value
            if isinstance(lsn, int) and isinstance(part, int):
                return cls.of(lsn, part)
        raise ProtocolError(f"{value!r:.80} is not a position, expected [lsn, part]")

    @classmethod
    def of(cls, lsn: int, part: int) -> Position:
        """Return the position with these numbers.

        Raises:
            ProtocolError: when it is none.
        """
        if 0 <= lsn <= MAX_LSN and 0 < part <= LAST:
            return cls(lsn, part)
        raise ProtocolError(f"{[lsn, part]!r:.80} is not a position, expected [lsn, part]")


ZERO = Position(0, LAST)
"""The position before everything."""
