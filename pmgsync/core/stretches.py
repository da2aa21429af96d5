"""Stretches: what this node has of a chain that does not count under the history it is about to take. Pure.

A stretch is noted before the document is taken, and kept until its changes are exported and the tables that they
touched are to be fetched anew. Where it ends is mostly not known at first: the database takes writes until its guard
knows the new master, and a worker applies until it hears of the document.

Invariant: while a stretch is pending, what its chain's origin wrote past the fork is in this node's tables, or in no
table; when it is over, it is in a divergence file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmgsync.core.document import Epoch
from pmgsync.core.forks import Divergence, diverged
from pmgsync.core.positions import MAX_LSN, Position, format_lsn, parse_lsn
from pmgsync.errors import ProtocolError

VERSION = 1
TableName = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of one life of a chain, above one commit LSN and up to another.

    Attributes:
        node: CID of the node that has it.
        epoch: the one in which it does not count.
        limit: where it ends at the latest, by the history; `MAX_LSN` when the history does not say.
        upto: where it ends, None while that is not known.
        exported: the changes are in the file, if there are any; what is left is to fetch the tables.
        tables: schema and name of those that were touched.
        lost: the journal did not have all of it: any table of the master's may have been touched.
        gained: the other way round: it did not count and does now, so its changes were left out here. There is nothing
            to export; the tables are fetched.
    """

    node: int
    epoch: int
    origin: int
    incarnation: int
    after: int
    limit: int = MAX_LSN
    upto: int | None = None
    exported: bool = False
    tables: tuple[TableName, ...] = ()
    lost: bool = False
    gained: bool = False

    @property
    def id(self) -> str:
        """Its name for people and files; no other node has one of the same name."""
        place = f"{self.origin}-{self.incarnation & 0xFFFF:04x}-{self.after:x}"
        return f"{self.epoch}-{self.node}-{place}{'-gained' if self.gained else ''}"

    @property
    def what(self) -> Divergence:
        """The stretch as a file's first line names it."""
        return Divergence(self.origin, self.incarnation, self.after, self.limit if self.upto is None else self.upto)

    def ended(self, at: int) -> Stretch:
        """Return the stretch when it is known that nothing after an LSN belongs to it."""
        return replace(self, upto=max(self.after, min(self.limit, at)))

    @property
    def empty(self) -> bool:
        """True when it is known to have no transaction."""
        return self.upto is not None and self.upto <= self.after

    def to_json(self) -> bytes:
        """Return the form in which it is kept on disk."""
        return json.dumps(
            {
                "stretch": VERSION,
                "node": self.node,
                "epoch": self.epoch,
                "origin": self.origin,
                "incarnation": self.incarnation,
                "after": format_lsn(self.after),
                "limit": format_lsn(self.limit),
                "upto": None if self.upto is None else format_lsn(self.upto),
                "exported": self.exported,
                "tables": [[part.decode("utf-8", "surrogateescape") for part in table] for table in self.tables],
                "lost": self.lost,
                "gained": self.gained,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Stretch:
        """Return what was kept.

        Raises:
            ProtocolError: when it cannot be read.
        """
        try:
            value: dict[str, Any] = json.loads(data)
            if value["stretch"] != VERSION:
                raise ValueError("unknown version")
            node, epoch, origin, incarnation = (value[name] for name in ("node", "epoch", "origin", "incarnation"))
            if not all(type(number) is int and number >= 0 for number in (node, epoch, origin, incarnation)):
                raise ValueError("not a number")
            return cls(
                *(node, epoch, origin, incarnation),
                parse_lsn(value["after"]),
                parse_lsn(value["limit"]),
                None if value["upto"] is None else parse_lsn(value["upto"]),
                value["exported"] is True,
                tuple((_raw(schema), _raw(name)) for schema, name in value["tables"]),
                value["lost"] is True,
                value["gained"] is True,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"a stretch of a chain cannot be read ({type(error).__name__})") from error


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def stretches_between(
    old: Sequence[Epoch], new: Sequence[Epoch], *, node: int, lives: Mapping[int, Collection[int]]
) -> tuple[Stretch, ...]:
    """Return what counted under the history held and does not under the one to be taken, however much of it is here.

    Where histories part, after a split, also what counts now of other nodes and did not.

    Args:
        node: CID of this node.
        lives: the incarnations of each chain that are known here, by origin; those that the histories name are too.
    """
    found = _lost(old, new, node, lives)
    if new[: len(old)] != old[: len(new)]:
        gained = _lost(new, old, node, lives)
        found += [replace(one, epoch=new[-1].epoch, gained=True) for one in gained if one.origin != node]
    return tuple(found)


def _lost(old: Sequence[Epoch], new: Sequence[Epoch], node: int, lives: Mapping[int, Collection[int]]) -> list[Stretch]:
    found: list[Stretch] = []
    for origin in sorted({entry.master for entry in old}):
        for incarnation in sorted({*lives.get(origin, ()), *_named(old, origin), *_named(new, origin)}):
            pieces = diverged(old, new, origin=origin, incarnation=incarnation, have=Position(MAX_LSN))
            found += [
                Stretch(node, new[-1].epoch, piece.origin, piece.incarnation, piece.after, piece.upto)
                for piece in pieces
            ]
    return found


def _named(history: Sequence[Epoch], origin: int) -> Iterable[int]:
    """Yield the incarnations of an origin's chain that a history names."""
    for number, entry in enumerate(history):
        if entry.start is not None and entry.master == origin:
            yield entry.start.incarnation
        if entry.fork is not None and number and history[number - 1].master == origin:
            yield entry.fork.incarnation
