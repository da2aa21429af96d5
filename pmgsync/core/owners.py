"""Who answers for a row: the node whose CID stands in its owner column, the master for nodes that are gone. Pure.

The rule is here twice, as a decision about a value and as an SQL condition, and nowhere else. A column has a CID when
its text is the number in decimal digits. Spaces around it do not count, because character(n) is padded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pmgsync.core.pgoutput import Value


@dataclass(frozen=True, slots=True)
class Writers:
    """Who may write what, at one moment.

    Attributes:
        origin: the node whose chain is applied.
        master: the master's CID.
        members: the CIDs of all members.
        leads: what the origin has written to tables of the master's counts. That depends on when it was the master
            (`forks.judge`), while the rows of members that are gone are those of the master of now.
    """

    origin: int
    master: int
    members: frozenset[int]
    leads: bool
    _own: bytes = field(init=False, repr=False, compare=False)
    _others: frozenset[bytes] | None = field(init=False, repr=False, compare=False)
    """Owner columns that the master's rows do not have; None when the origin is not the master."""

    def __post_init__(self) -> None:
        others = frozenset(b"%d" % cid for cid in self.members if cid != self.origin)
        object.__setattr__(self, "_own", b"%d" % self.origin)
        object.__setattr__(self, "_others", others if self.origin == self.master else None)

    @classmethod
    def at(cls, origin: int, master: int, members: Collection[int], *, leads: bool | None = None) -> Writers:
        """Return the writers with any collection of members; `leads` is for the master alone if not said otherwise."""
        return cls(origin, master, frozenset(members), origin == master if leads is None else leads)

    def answers_for(self, owner: Value) -> bool:
        """Return True when rows with this owner column are the origin's to write."""
        text = owner.strip(b" ") if type(owner) is bytes else b""
        return text == self._own if self._others is None else text not in self._others

    def condition(self, column: bytes) -> bytes:
        """Return the SQL condition that is true for the rows for which `answers_for` is.

        Args:
            column: the expression of the owner column, of any type.
        """
        text = b'pg_catalog.btrim((%s)::pg_catalog.text) COLLATE pg_catalog."C"' % column
        if self._others is None:
            return b"%s = '%s'" % (text, self._own)
        if not self._others:
            return b"true"
        return b"(%s IS NULL OR %s NOT IN (%s))" % (
            column, text, b", ".join(b"'%s'" % cid for cid in sorted(self._others)),
        )  # fmt: skip
