"""The applier of one origin: takes the frames of its chain and commits their transactions, in order, each once.

Invariant: what is committed here is a prefix of the chain, and pmgsync.position, written by the same transactions, says
which. So whatever ends a transaction early, the next applier goes on where this one stood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import psycopg2
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from pmgsync.core.changes import Change, Piece, Unread, transactions
from pmgsync.core.document import Epoch, Fork
from pmgsync.core.frames import Frame, check_chain, is_part, messages_of, unpack_body, with_parts
from pmgsync.core.judges import Judge
from pmgsync.core.named_files import Files, NamedFile
from pmgsync.core.positions import LAST, Position
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, ProtocolError
from pmgsync.postgres.apply import maintenance
from pmgsync.postgres.apply.chain_session import ChainSession
from pmgsync.postgres.apply.execution import Execution
from pmgsync.postgres.apply.plan import ApplyStats, PlannedTransaction, SchemaItem
from pmgsync.postgres.apply.stale import StaleTables, TableName
from pmgsync.postgres.apply.together import planned_together

GROUP_CHANGES = 20_000
"""A local transaction of small transactions ends with the frame in which it comes to more row changes than this."""


@dataclass(slots=True)
class _Half:
    """A large transaction that is not committed yet.

    Attributes:
        part: the newest that was taken.
        changes: how many of it were executed.
        waiting: what is planned of the newest parts and not executed: many parts together go in by one COPY.
        waits: how many changes these are.
    """

    lsn: int
    attempt: int
    part: int
    changes: int
    waiting: PlannedTransaction
    waits: int


# Over 250 lines: one class holds what is committed, half done and planned of a chain, which only make sense together.
class Applier:
    """Applies one origin's chain to the local database. For one thread; only `cancel` may be called from another.

    Args:
        dsn: of the local database.
        origin: CID of the node whose chain it is.
        own_cid: CID of this node.
        history: returns the epochs of the document held, asked at every `apply`.
        members: returns all members' CIDs.
        followed: returns the CIDs of those whose chains are applied here.
        elsewhere: returns the newest epoch of the other side while the origin is there in a split, else 0.
        holds: returns why changes that a later master made may not be applied yet, "" when they may.
        stale: what is known of stale tables, when it is to outlive this object.
        files: looks for the files that rows name, and waits for them; None: no row waits.
        waits: True: a commit waits for the disk; False: it is visible before, and `flush` makes it durable.

    Attributes:
        stats: counters, of this object's life.
        origin: CID of the node whose chain it is.
        failures: sentences on changes of the schema that could not be repeated; replaced as a whole.
        on_wait: called when what precedes a row is committed, and its file is waited for.
    """

    def __init__(
        self,
        dsn: str,
        profile: Profile,
        *,
        origin: int,
        own_cid: int,
        history: Callable[[], Sequence[Epoch]],
        members: Callable[[], Collection[int]],
        followed: Callable[[], Collection[int]] | None = None,
        elsewhere: Callable[[], int] = lambda: 0,
        holds: Callable[[], str] = lambda: "",
        stale: StaleTables | None = None,
        waits: bool = True,
        files: Files | None = None,
    ) -> None:
        assert origin != own_cid  # a node's own chain comes back to it only by a fault
        self._dsn = dsn
        self._profile = profile
        self.origin = origin
        self._history = history
        self._members = members
        self._followed = followed or members
        self._elsewhere = elsewhere
        self._holds = holds
        self._own_cid = own_cid
        self._judge: Judge | None = None
        self._judged: object = None
        self._begins = False
        self.stats = ApplyStats()
        self._trimmed = 0
        self._half: _Half | None = None
        self.failures: list[str] = []
        self._files = files
        self.on_wait: Callable[[], None] = lambda: None
        self.stale = stale or StaleTables(origin)
        self._session = ChainSession(dsn, origin, waits=waits)
        self._execution = Execution(self._session, profile, self.stats, self.stale)

    def connect(self) -> tuple[int, Position] | None:
        """Open the session and return what the database says of this chain: incarnation and position; None: nothing.

        Raises:
            UnreachableError: when the server does not let the session in.
            TransientApplyError: when another session still applies this chain.
            ApplyError: when the database is not set up.
        """
        self.close()
        self._judge = None
        self._execution = Execution(self._session, self._profile, self.stats, self.stale)
        try:
            known = self._session.open()
            with self._session.cursor() as cursor:
                self.stale.load(cursor)
                self.failures = maintenance.schema_failures(cursor, self.origin)
        except psycopg2.Error as error:
            self.close()
            raise self._session.failed(error, "", 0) from error
        return (self._session.incarnation, self.position) if known else None

    def begin_chain(self, incarnation: int, position: Position) -> None:
        """Begin to follow a chain, or a new incarnation of one, at a position that this database is known to have.

        Raises:
            ApplyError: when the database does not take it.
        """
        self._session.begin_chain(incarnation, position)

    @property
    def position(self) -> Position:
        """The newest complete position that is committed here, and can be read."""
        return self._session.position

    @property
    def durable(self) -> Position:
        """The newest position that a crash of the server cannot take back."""
        return self._session.durable

    def flush(self) -> None:
        """Make what was committed durable; not while a large transaction is half in, whose commit comes later.

        Raises:
            TransientApplyError: when the server does not answer.
        """
        if self._half is None:
            self._session.flush()

    def close(self) -> None:
        """End the session; a half transaction is rolled back by the server."""
        self._half = None
        self._session.close()

    def cancel(self) -> None:
        """End what `apply` executes or waits for, from another thread; it raises TransientApplyError."""
        if self._files is not None:
            self._files.cancel()
        self._session.cancel()

    def abandon(self) -> None:
        """Drop the parts of a half transaction."""
        if self._half is not None:
            self._half = None
            self._execution.rollback()

    def apply(self, frames: Sequence[Frame], received: float = -math.inf) -> Position:
        """Apply what follows the position, and return the newest complete position that is committed.

        Frames may overlap with what is in already. Parts of a large transaction are executed at once and committed with
        the last one, unless all of them are here: then it is one of a group, like a small one.

        Args:
            received: when the frames came to this node, of the monotonic clock: from then on rows wait for their files.

        Raises:
            ResyncRequiredError: when a frame is of another incarnation.
            ProtocolError: when a frame cannot be read, or leaves a gap.
            UnknownEpochError: when a transaction is of a later epoch than those known; what precedes it is committed.
            AwaitedError: when something else has to be done on this node first; what precedes it is committed.
            TransientApplyError: when repeating may help.
            ApplyError: when the chain cannot go on. What precedes the transaction named is committed.
            UnreachableError: when the session was lost and there is no new one.
        """
        if not self._session.is_open:
            self.connect()
        judge = self._judging()
        group: list[PlannedTransaction] = []
        reached, changes, planner = self.position, 0, self._execution.planner
        planner.look_again()
        try:
            for parts in with_parts(frames, GROUP_CHANGES):
                for frame in parts:
                    check_chain(frame, self.origin, self._session.incarnation)
                if frame.here <= reached:
                    continue
                if len(parts) == 1 and is_part(frame.header):
                    self._execution.commit_group(group, reached)
                    group, changes = [], 0
                    self._take_part(frame, judge, received)
                    reached = self.position
                    continue
                if parts[0].prev > reached:
                    raise ProtocolError(f"a frame of origin {self.origin} follows {parts[0].prev}, here is {reached}")
                self.abandon()
                cursor = self._session.cursor()
                messages = messages_of(parts)
                whole = planned_together(planner, judge, frame, messages, reached, lambda: self._begins)
                # What precedes a row whose file is waited for is committed first.
                if whole is not None and not self._missing(received):
                    group.append(whole)
                    messages = []
                for piece in transactions(messages):
                    if piece.begin is None or piece.commit is None:
                        raise ProtocolError("a frame of whole transactions holds a part of one")
                    lsn = piece.commit.commit_lsn
                    if lsn <= reached.lsn:
                        continue
                    if lsn > frame.here.lsn:
                        raise ProtocolError(f"a frame that ends at {frame.here} holds a transaction beyond its end")
                    try:
                        planner.set_writers(judge.writers(frame.header, lsn))
                        if self._begins:
                            self._execution.commit_group(group, reached)
                            group = []
                            self._begin_epoch(cursor)
                        items, rest = planner.plan(cursor, piece.changes, lsn)
                    except PmgsyncError:
                        # What precedes it must not wait until it can be applied.
                        self._execution.commit_group(group, reached)
                        raise
                    if missing := self._missing(received):
                        self._execution.commit_group(group, reached)
                        group, changes = [], 0
                        self._wait(missing, received)
                    planned = PlannedTransaction(lsn, piece.commit.commit_time_us, items)
                    alone = bool(items) and type(items[-1]) is SchemaItem
                    if not alone:
                        group.append(planned)
                        reached = Position(lsn, LAST)
                    else:
                        self._execution.commit_group(group, reached)
                        group, changes = [], 0
                        self._execution.commit_steps(planned, rest)
                        reached = self.position
                reached = max(reached, frame.here)
                changes += sum([frame.header.changes for frame in parts])
                if changes > GROUP_CHANGES:
                    self._execution.commit_group(group, reached)
                    group, changes = [], 0
            self._execution.commit_group(group, reached)
            self._execute_waiting()
        except PmgsyncError:
            self._half = None
            self._execution.recover()
            raise
        except psycopg2.Error as error:
            self._half = None
            self._execution.recover()
            raise self._session.failed(error, "", reached.lsn) from error
        return self.position

    def _judging(self) -> Judge:
        """Return the judge under the history of now."""
        known = self._history(), self._members(), self._elsewhere()
        if self._judge is None or known != self._judged:
            self._judge, self._judged = Judge(self.origin, *known, self._awaits), known
        return self._judge

    def _awaits(self, before: int, fork: Fork) -> str:
        """Return what has to be applied here before what a master wrote whose time began at a fork."""
        if fork.lsn and before != self._own_cid and before in self._followed():
            with self._session.cursor() as cursor:
                found = maintenance.applied(cursor, before)
            # Of another life it was copied whole, after that fork.
            if found is None or (found[0] == fork.incarnation and found[1] < fork.lsn):
                return f"the chain of node {before}, the master before, is not applied up to {fork} here yet"
        reason = self._holds()
        self._begins = not reason
        return reason

    def _begin_epoch(self, cursor: Cursor) -> None:
        """Look at what was noted while an epoch was waited for: tables that are to be fetched first."""
        self._begins = False
        self.stale.load(cursor)

    def _missing(self, received: float) -> list[NamedFile]:
        """Return which files are to be waited for that rows name which were planned last."""
        named = self._execution.planner.take_named()
        return self._files.missing(named, received) if named and self._files is not None else []

    def _wait(self, missing: Sequence[NamedFile], received: float) -> None:
        assert self._files is not None
        self.flush()
        self.on_wait()
        self._files.wait(missing, received)

    def _take_part(self, frame: Frame, judge: Judge, received: float) -> None:
        header, half = frame.header, self._half
        if header.prev.complete:
            if header.prev > self.position:
                raise ProtocolError(f"a frame of origin {self.origin} follows {header.prev}, here is {self.position}")
            self.abandon()
            half = None
        elif half is None or half.lsn != header.here.lsn or half.attempt != header.attempt:
            # Of another run of capture than the parts in hand. It is begun again at its first part.
            self.abandon()
            return
        elif header.here.part <= half.part:
            return
        elif header.prev.part != half.part:
            raise ProtocolError(f"a part of origin {self.origin} follows {header.prev}, here is part {half.part}")
        pieces = list(transactions(unpack_body(frame.body)))
        if len(pieces) > 1 or (pieces and (pieces[0].begin is None) != (half is not None)):
            raise ProtocolError("a part of a transaction holds something else")
        piece = pieces[0] if pieces else Piece(None, [], None)
        if (piece.commit is not None) != header.here.complete:
            raise ProtocolError("a transaction's last part has no Commit, or another part has one")
        lsn = header.here.lsn
        self._execution.planner.set_writers(judge.writers(header, lsn))
        with self._session.cursor() as cursor:
            if half is None:
                if self._begins:
                    self._begin_epoch(cursor)
                self._execution.begin(cursor)
                half = self._half = _Half(lsn, header.attempt, 0, 0, PlannedTransaction(lsn, None, []), 0)
            items, rest = self._execution.planner.plan(cursor, piece.changes, lsn)
            if missing := self._missing(received):
                self._wait(missing, received)
            half.part, half.waits = header.here.part, half.waits + header.changes
            half.waiting.items += items
            half.waiting.commit_time = header.commit_time
            changes_schema = bool(items) and type(items[-1]) is SchemaItem
            if changes_schema or half.waits > GROUP_CHANGES or piece.commit is not None:
                self._execute_waiting(rest)
            if piece.commit is None:
                return
            time = piece.commit.commit_time_us
            self._execution.finish(cursor, header.here, time, transactions=1, changes=half.changes)
        self._half = None

    def _execute_waiting(self, rest: Sequence[Change | Unread] = ()) -> None:
        """Execute what waits of the half transaction, if there is one, and then the rest."""
        half = self._half
        if half is None or not (half.waiting.items or rest):
            return
        with self._session.cursor() as cursor:
            half.changes += self._execution.execute_steps(cursor, half.waiting, rest)
        half.waiting.items, half.waits = [], 0

    def maintain(self) -> list[TableName]:
        """Return the stale tables that can be fetched anew now; to be called every few seconds, between two `apply`.

        Rows that were merged into something that their origin may not know are published again meanwhile.

        Raises:
            ApplyError: when the database does not answer as it should.
            UnreachableError: when the session was lost.
        """
        if self._half is not None:
            return []
        try:
            with self._session.cursor() as cursor:
                self._trimmed = maintenance.trim_conflicts(cursor, self.origin, self._trimmed, self.stats.conflicts)
                repairing = maintenance.repairs_wait(cursor, self.origin)
                self.failures = maintenance.schema_failures(cursor, self.origin)
                self.stale.sweep(cursor, self.position.lsn)
                found = maintenance.fetchable(cursor, self.stale, self._execution.planner.rule)
        except psycopg2.Error as error:
            raise self._session.failed(error, "", 0) from error
        if repairing:
            maintenance.republish(self._dsn, self.origin)
        self.stale.tried(found, found)
        return list(found)
