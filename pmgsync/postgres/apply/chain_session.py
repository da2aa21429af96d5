"""The session in which one origin's chain is applied: it holds the chain's position, and moves it when it commits."""

from __future__ import annotations

import contextlib

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.positions import LAST, Position, format_lsn, parse_lsn
from pmgsync.errors import ApplyError, TransientApplyError
from pmgsync.postgres.apply.durability import commit_setting, make_durable
from pmgsync.postgres.apply.failures import apply_error
from pmgsync.postgres.replication_origin import take_origin
from pmgsync.postgres.session import connect, rows

PREDECESSOR_S = 3.0
"""Seconds that a session of the same origin is given to end."""

# One plan a statement, made without looking at values, and never a scan of the table where an index serves: statistics
# may be older than the rows that just came in. JIT, off in every session, would take the disabled scan's cost for a
# reason to compile.
_SESSION = b"""
SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET client_min_messages = notice"""

PREPARE_MOVE = b"""
PREPARE move_position (integer, bigint, pg_lsn, pg_lsn, bigint, interval) AS
WITH hit AS (
    UPDATE pmgsync.position SET lsn = $4, part = $5, commit_time = coalesce('epoch'::timestamptz + $6, commit_time)
    WHERE origin = $1 AND incarnation = $2 AND lsn = $3 RETURNING 1)
SELECT pmgsync.diverged() FROM hit HAVING pg_catalog.count(*) <> 1"""
"""Prepares what `ChainSession.commit_at` executes in every transaction; planning it took more than half of the server's
time for a lone one. It fails when the position is not the one that the session knows: somebody else has moved it."""


class Notices:
    """Stands in for psycopg2's list of notices, which keeps only the newest 50."""

    def __init__(self) -> None:
        self.missing = 0
        self.lost: list[str] = []

    def clear(self) -> None:
        """Forget what was told in a transaction that is over."""
        self.missing = 0
        self.lost.clear()

    def append(self, text: str) -> None:
        """Take a notice of the server's."""
        if "pmgsync missing " in text:
            self.missing += 1
        elif "pmgsync lost " in text:
            self.lost.append(text.partition("pmgsync lost ")[2].partition("\n")[0])


class ChainSession:
    """A session of one origin. For one thread; only `cancel` may be called from another.

    Attributes:
        origin: CID of the node whose chain it is.
        incarnation: of the chain, 0 when none was begun.
        position: the newest complete position that is committed here, and can be read.
        notices: what the server has told in the open transaction.
    """

    def __init__(self, dsn: str, origin: int, *, waits: bool) -> None:
        """Prepare.

        Args:
            waits: True: a commit waits for the disk; False: it is visible before, and `flush` makes it durable.
        """
        self.origin = origin
        self.incarnation = 0
        self.position = Position(0, LAST)
        self.notices = Notices()
        self._dsn = dsn
        self._waits = waits
        self._durable = self.position
        self._connection: Connection | None = None

    @property
    def is_open(self) -> bool:
        """True when there is a connection that is not known to be lost."""
        return self._connection is not None and not self._connection.closed

    def open(self) -> bool:
        """Open the session and read the chain's position; False when the database has none.

        Raises:
            UnreachableError: when the server does not let the session in.
            psycopg2.Error: when another session still applies this chain, or the database is not set up.
        """
        connection = connect(self._dsn, application_name=f"pmgsync apply {self.origin}", replica=True)
        connection.autocommit = True
        self.notices = Notices()
        connection.notices = self.notices  # type: ignore[assignment]
        self._connection = connection
        with connection.cursor() as cursor:
            cursor.execute(_SESSION)
            cursor.execute(commit_setting(waits=self._waits))
            cursor.execute(PREPARE_MOVE)
            # Marks what is written here as not this node's own, so that capture does not send it again. A second
            # session of the same origin is refused, so there is one applier a chain.
            take_origin(cursor, self.origin, patience_s=PREDECESSOR_S)
            cursor.execute(b"SELECT incarnation, lsn::text, part FROM pmgsync.position WHERE origin = %d" % self.origin)
            found = rows(cursor)
            # Another session may have committed it an instant ago, without waiting.
            make_durable(cursor)
        self.incarnation, self.position = 0, Position(0, LAST)
        if found:
            incarnation, lsn, part = found[0]
            assert incarnation is not None and lsn is not None and part is not None
            self.incarnation, self.position = int(incarnation), Position(parse_lsn(lsn.decode()), int(part))
        self._durable = self.position
        return bool(found)

    def begin_chain(self, incarnation: int, position: Position) -> None:
        """Begin to follow a chain, or a new incarnation of one, at a position that this database is known to have.

        Raises:
            ApplyError: when the database does not take it.
        """
        assert position.complete
        with self.cursor() as cursor:
            try:
                cursor.execute(
                    b"INSERT INTO pmgsync.position (origin, incarnation, lsn, part) VALUES (%d, %d, '%s', %d) "
                    b"ON CONFLICT (origin) DO UPDATE SET incarnation = EXCLUDED.incarnation, lsn = EXCLUDED.lsn, "
                    b"part = EXCLUDED.part, commit_time = NULL"
                    % (self.origin, incarnation, format_lsn(position.lsn).encode(), position.part)
                )
            except psycopg2.Error as error:
                raise self.failed(error, "", position.lsn) from error
        self.incarnation, self.position = incarnation, position
        self.flush()

    @property
    def durable(self) -> Position:
        """The newest position that a crash of the server cannot take back."""
        return self.position if self._waits else self._durable

    def flush(self) -> None:
        """Make what was committed durable; not to be called inside a transaction.

        Raises:
            TransientApplyError: when the server does not answer.
        """
        if self.durable == self.position:
            return
        with self.cursor() as cursor:
            try:
                make_durable(cursor)
            except psycopg2.Error as error:
                raise self.failed(error, "", self.position.lsn) from error
        self._durable = self.position

    def close(self) -> None:
        """End the session; an open transaction is rolled back by the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def cancel(self) -> None:
        """End the statement that is being executed, from another thread."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(psycopg2.Error):
                connection.cancel()

    def cursor(self) -> Cursor:
        """Return a cursor.

        Raises:
            TransientApplyError: when the session is closed.
        """
        if self._connection is None:
            raise TransientApplyError("the session on the local database is closed")
        return self._connection.cursor()

    def commit_at(self, reached: Position, commit_time: int | None) -> list[bytes]:
        """Return the statements that move the position and commit.

        Args:
            commit_time: of the last transaction, µs since 1970, None: as before.
        """
        when = b"NULL" if commit_time is None else b"'%d us'" % commit_time
        move = b"EXECUTE move_position (%d, %d, '%s', '%s', %d, %s)" % (
            self.origin, self.incarnation, format_lsn(self.position.lsn).encode(),
            format_lsn(reached.lsn).encode(), reached.part, when,
        )  # fmt: skip
        return [move, b"COMMIT"]

    def failed(self, error: psycopg2.Error, table: str, lsn: int) -> ApplyError:
        """Return this project's error for one of the server's."""
        return apply_error(error, origin=self.origin, table=table, lsn=lsn)
