"""The prepared statements of a session: each is prepared at its first use, all are dropped when there are many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.postgres.apply.target import Target

MAX_PREPARED = 1000
"""Prepared statements that are kept; each holds a plan in the server's memory."""


class PreparedStatements:
    """Names statements and drops them; what is known of them stands in their targets.

    Attributes:
        tables: the names of the tables that statements were prepared for, by the target's number.
    """

    def __init__(self, always: bytes = b"") -> None:
        """Begin with none.

        Args:
            always: the PREPARE of a statement that the session has from its start, and keeps.
        """
        self._always = always
        self._count = 0
        self._targets: list[Target] = []
        self.tables: dict[int, str] = {}

    def name(
        self, cursor: Cursor, target: Target, shape: object, make: Callable[[], tuple[bytes, Sequence[bytes]]]
    ) -> bytes:
        """Return the name of a prepared statement on a target, prepared now if it was not.

        Args:
            shape: what tells the statements on one target apart.
            make: returns the statement and its parameters' types.
        """
        name = target.prepared.get(shape)
        if name is None:
            target.prepared[shape] = name = self.prepare(cursor, target, *make())
        assert isinstance(name, bytes)
        return name

    def prepare(self, cursor: Cursor, target: Target, sql: bytes, types: Sequence[bytes]) -> bytes:
        """Prepare a statement and return its name; the caller keeps it in the target."""
        if not target.prepared:
            self._targets.append(target)
        self.tables[target.number] = target.relation.qualified
        self._count += 1
        name = b"p%d_%d" % (target.number, self._count)
        cursor.execute(b"PREPARE %s%s AS %s" % (name, b"(%s)" % b", ".join(types) if types else b"", sql))
        return name

    def trim(self, cursor: Cursor) -> None:
        """Drop the statements when there are many; no script may wait that refers to them."""
        if self._count > MAX_PREPARED:
            self.forget(cursor)

    def forget(self, cursor: Cursor) -> None:
        """Drop the statements."""
        cursor.execute(b"DEALLOCATE ALL;" + self._always)
        for target in self._targets:
            target.prepared.clear()
        self._targets.clear()
        self._count = 0
