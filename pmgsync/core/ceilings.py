"""Sequences: how far ahead of the master's value the other nodes' copies stand, so that none is handed out twice. Pure.

A chain of row changes does not have the values of sequences. So now and then the master publishes a *ceiling*, a value
that it has not handed out yet, and the others set their copy to it; a node that is promoted goes on behind the ceiling.

Invariant: the master looks at a sequence at an interval. As long as it hands out at most `Ceiling.allowance` values
from one look to the next, no value handed out is beyond the ceiling that was in force meanwhile. A ceiling comes before
the rows with its values in the chain, so this is true of every prefix of the chain that a node may be promoted with.
The allowance is at least half of `MIN_MARGIN`, and four times the highest recent consumption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from pmgsync.errors import ProtocolError

PREFIX = "pmgsync.sequence"
"""Of the logical message that carries ceilings."""
MIN_MARGIN = 4096
"""A ceiling is at least so many values ahead; that many are skipped when a node is promoted."""
FACTOR = 8
"""A ceiling is so many times the highest recent consumption of an interval ahead."""
SHARE = 16
"""At most 1/SHARE of all values of a sequence are skipped: a smallint sequence must not end early."""
FORGET = 16
"""An interval's consumption counts half after so many intervals."""
MAX_NAME = 1024

Name = tuple[bytes, bytes]
"""Schema and name."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence as the catalog describes it, and where it stands.

    Attributes:
        last: the newest value that may have been handed out (with a cache, sessions hold values up to it); of a
            sequence that was not used yet, one increment before its first.
    """

    increment: int
    minimum: int
    maximum: int
    cycle: bool
    last: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return (self.maximum - self.minimum) // abs(self.increment) + 1

    @property
    def room(self) -> int:
        """How many values are left before its end, or before it begins again."""
        return max(0, (self._end - self.last) // self.increment)

    @property
    def _end(self) -> int:
        return self.maximum if self.increment > 0 else self.minimum

    def ahead(self, steps: int) -> int:
        """Return the value so many steps on: never beyond the end unless it cycles."""
        if steps <= self.room:
            return self.last + steps * self.increment
        if not self.cycle:
            # At the end a promoted node has no values left, as the master soon will have none; no value is used twice.
            return self._end
        first = self.minimum if self.increment > 0 else self.maximum
        return first + (steps - self.room - 1) % self.size * self.increment

    def used_since(self, last: int) -> int | None:
        """Return how many values were handed out since it stood there, None when it was set back."""
        steps = -((last - self.last) // self.increment)
        if steps >= 0:
            return steps
        return steps % self.size if self.cycle else None


class Value(NamedTuple):
    """What a node sets its copy of a sequence to.

    Attributes:
        exact: set it even if that is backward: the master's was set back, or it cycles. Otherwise only forward.
    """

    schema: bytes
    name: bytes
    value: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What is published of one sequence.

    Attributes:
        value: of the newest ceiling, None when there is none yet.
        allowance: how many values the master may hand out from the newest look on until it reaches it.
        last: where the master's stood then.
        recent: the consumption per interval that is expected.
    """

    value: int | None = None
    allowance: int = 0
    last: int = 0
    recent: int = 0


def margin(sequence: Sequence, recent: int) -> int:
    """Return how many values a new ceiling is ahead."""
    return max(1, min(max(MIN_MARGIN, FACTOR * recent), sequence.size // SHARE))


def look(ceiling: Ceiling, sequence: Sequence) -> tuple[Ceiling, bool, bool]:
    """Return what is known after a look, whether a ceiling is to be published, and whether it is exact."""
    used = 0 if ceiling.value is None else sequence.used_since(ceiling.last)
    # When it was set back, nothing is known of what was used; the earlier consumption is still expected.
    recent = max(used or 0, ceiling.recent - -(-ceiling.recent // FORGET))
    wanted = margin(sequence, recent)
    if ceiling.value is not None and used is not None:
        left = ceiling.allowance - used
        at_end = not sequence.cycle and ceiling.value == sequence.ahead(sequence.size)
        if left >= wanted // 2 or at_end:
            return Ceiling(ceiling.value, left, sequence.last, recent), False, False
    renewed = Ceiling(sequence.ahead(wanted), wanted, sequence.last, recent)
    return renewed, True, sequence.cycle or used is None


class Ceilings:
    """The ceilings of all sequences of a master."""

    def __init__(self) -> None:
        self._known: dict[Name, Ceiling] = {}
        self._repeat = False

    def look(self, sequences: Mapping[Name, Sequence]) -> list[Value]:
        """Take a look at all sequences and return what is to be published now."""
        found: dict[Name, Ceiling] = {}
        values = []
        for name, sequence in sequences.items():
            found[name], publish, exact = look(self._known.get(name, Ceiling()), sequence)
            value = found[name].value
            if (publish or self._repeat) and value is not None:
                values.append(Value(*name, value, exact or sequence.cycle))
        self._known, self._repeat = found, False
        return values

    def repeat(self) -> None:
        """Publish every ceiling at the next look: a snapshot has the sequences' values, not their ceilings, so a node
        that has joined since they were published does not know them."""
        self._repeat = True

    def forget(self) -> None:
        """Publish every ceiling again at the next look: it is not known whether the newest ones are in the chain."""
        self._known.clear()


def pack_values(values: Iterable[Value]) -> bytes:
    """Return the content of a message."""
    return msgpack.packb([list(value) for value in values], use_bin_type=True)  # type: ignore[no-any-return]


def unpack_values(content: bytes) -> list[Value]:
    """Return what a message says. Elements after the fourth belong to a later version and are ignored.

    Raises:
        ProtocolError: when it is not what `pack_values` makes.
    """
    try:
        found = msgpack.unpackb(content, use_list=True, raw=False, max_ext_len=0, max_map_len=0)
    except Exception as error:  # msgpack raises ValueError, its own types and, for depth, StackError
        raise ProtocolError(f"a message of sequences is not MessagePack ({error})") from error
    if not isinstance(found, list):
        raise ProtocolError("a message of sequences is not an array")
    return [_value(entry) for entry in found]


def _value(entry: Any) -> Value:
    match entry:
        case [bytes(schema), bytes(name), int(value), bool(exact), *_]:
            if (
                type(value) is int and -(2**63) <= value < 2**63
                and 0 < len(schema) <= MAX_NAME and 0 < len(name) <= MAX_NAME and b"\0" not in schema + name
            ):  # fmt: skip
                return Value(schema, name, value, exact)
    raise ProtocolError("a message of sequences holds something other than names and values")
