"""A tree that another node answers for: follows its announcements, fetches what is missing and puts it in place."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pmgsync.agent.actions import Actions
from pmgsync.agent.tree_client import StoppedError, TreeClient
from pmgsync.agent.tree_thread import Place, TreeThread
from pmgsync.core.announcements import Announcement
from pmgsync.core.backoff import Backoff
from pmgsync.core.trees import profile_path
from pmgsync.errors import ProtocolError, UnreachableError
from pmgsync.files.batches import Batch
from pmgsync.files.directories import FilesError
from pmgsync.files.intake import Intake
from pmgsync.files.staging import WrongContentError
from pmgsync.wire.waiting import Waiter

CONFIG_QUIET_S = 0.2
"""Seconds before an edit on this node is looked at: whoever makes it may not be finished."""
REST_S = 60.0
REST_STEP_S = 0.2
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
KEPT_SHOWN = 5
TURN_BYTES = 16 << 20
"""So much of a large file is fetched before others are looked for that go before it."""
MAX_NEWS = 200
"""Of at most 64 KiB; the owner announces again every two seconds."""


class FollowedTree(TreeThread):
    """Keeps one tree as its owner has it."""

    def __init__(
        self,
        place: Place,
        changed: Callable[[], None],
        *,
        cid: int,
        broker: Path,
        state_dir: Path,
        actions: Actions,
    ) -> None:
        """Begin.

        Args:
            cid: of this node.
            broker: the local socket.
            state_dir: where contents go that this node brings to a configuration it begins to follow.
            actions: what is run after changes.
        """
        super().__init__(place, changed)
        self._cid = cid
        self._state_dir = state_dir
        self._actions = actions
        self._client = TreeClient(broker, stopping=lambda: self.stopping)
        self._news: queue.SimpleQueue[Announcement] = queue.SimpleQueue()
        self._doubted: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._announced = b""
        self._lsn = 0
        self._compare_due = True
        self._retry_at = 0.0
        self._retries = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S)
        self._kept: list[str] = []

    def hear(self, announcement: Announcement) -> None:
        """Take an announcement of the owner's; may be called from any thread.

        While the thread is busy only some are kept: what is missed shows in the next one, and is asked for.
        """
        if self._news.qsize() < MAX_NEWS:
            self._news.put(announcement)
        self.wakeup.wake()

    def refetch(self, names: Sequence[bytes]) -> None:
        """Compare names with the owner's content again, and fetch what differs; may be called from any thread."""
        self._doubted.put(list(names))
        self.wakeup.wake()

    def work(self) -> None:
        """Follow until the thread is to end."""
        self._compare_due = True
        try:
            if not self.place.path.is_dir() and not self._client.sums(self.tree.owner, self.tree.name)[1].strip(b"\0"):
                # The owner has nothing, and here is no directory to put it into: none is made.
                self.recovered()
                Waiter(wakeup=self.wakeup).wait(REST_S)
                return
            place = self.place
            intake = Intake(self.tree, place.path, place.cache, place.limits, self._cid, self._state_dir)
        except StoppedError:
            return
        try:
            self._follow(intake)
        except StoppedError:
            return
        except ProtocolError as error:
            raise ProtocolError(f"node {self.tree.owner} sends what cannot be a tree's: {error.message}") from error
        finally:
            intake.close()
            self._client.close()

    def _follow(self, intake: Intake) -> None:
        local = intake.local
        waiter = Waiter(wakeup=self.wakeup) if local is None else Waiter(local.fileno(), wakeup=self.wakeup)
        if self.take_acceptance():
            intake.accept()
        while not self.stopping:
            try:
                self._bring_in_line(intake)
            except (UnreachableError, FilesError) as error:
                # The tree stays open: scanning it again would take a while.
                self._compare_due = True
                self._count(intake)
                self.trouble(error)
                self._rest(self._backoff.failed(), for_owner=isinstance(error, UnreachableError))
                continue
            waiter.wait(self._rest_s(intake))
            if self.take_acceptance():
                intake.accept()
            if local is not None and self._news.empty():
                waiter.wait(CONFIG_QUIET_S)

    def _bring_in_line(self, intake: Intake) -> None:
        self._hear(intake)
        if self._retry_at and time.monotonic() >= self._retry_at:
            self._retry_at, self._compare_due = 0.0, True
            intake.postponed.clear()
        if self._compare_due:
            self._compare(intake)
        while not self._doubted.empty():
            intake.refetch(self._doubted.get())
        try:
            self._work_off(intake)
        except (UnreachableError, FilesError):
            # What is on its way can be put in place all the same.
            self._place_begun(intake)
            raise
        self._note(intake)

    def _work_off(self, intake: Intake) -> None:
        while not self.stopping:
            batch = intake.batch()
            if intake.under_way.batch is not None and (
                batch is None or intake.under_way.overtaken or not intake.may_wait(batch)
            ):
                self._place_begun(intake)
                continue
            if batch is None:
                return
            self._take_in(intake, batch)
            self._note(intake)
            self._hear(intake)
            if self._compare_due:
                # A first sync takes minutes; what is new since is to come before the rest of it.
                self._compare(intake)

    def _rest(self, seconds: float, *, for_owner: bool) -> None:
        """Wait before the next try; `for_owner`: an owner that was out of reach and is heard again ends it."""
        if not for_owner:
            self._pause(seconds)
            return
        deadline = time.monotonic() + seconds
        while self._news.empty() and not self._accepted.is_set() and time.monotonic() < deadline and not self.stopping:
            self._pause(REST_STEP_S)

    def _rest_s(self, intake: Intake) -> float:
        rest = REST_S if intake.local is None else min(REST_S, intake.local.due_s())
        if self._compare_due:
            return 0.0
        return min(rest, max(0.0, self._retry_at - time.monotonic())) if self._retry_at else rest

    # -- what the owner says ------------------------------------------------------------------------------------------

    def _hear(self, intake: Intake) -> None:
        """Take in what was announced; ask for a comparison when the changes do not follow what is known."""
        while True:
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return
            self._announced = news.digest
            self._lsn = max(self._lsn, news.lsn)
            if intake.owner.digest == news.digest:
                continue
            if news.changes is not None and intake.owner.digest == news.base and intake.known:
                intake.offer(news.changes)
            # Names that this node does not synchronise make a difference that stays; comparing entries shows which.
            self._compare_due = self._compare_due or intake.owner.digest != news.digest

    def _compare(self, intake: Intake) -> None:
        owner, name = self.tree.owner, self.tree.name
        digest, sums = self._client.sums(owner, name)
        if digest != intake.owner.digest:
            groups = intake.owner.differing(sums)
            for buckets, entries in self._client.entries(owner, name, groups, self.place.limits.max_count):
                intake.compare(buckets, entries)
        intake.compared()
        self._announced = digest
        self._compare_due = False

    # -- batches ------------------------------------------------------------------------------------------------------

    def _take_in(self, intake: Intake, batch: Batch) -> None:
        lost = self._fetch(intake, batch)
        if lost is None:
            return
        if lost:
            batch = intake.without(batch, lost)
            self._retry_later()
        if not batch.steps and not batch.entries:
            return
        commands = self._actions.expect(profile_path(self.tree, step.name) for step in batch.steps)
        self._place_begun(intake)
        if not commands and intake.may_wait(batch):
            intake.begin(batch)
            return
        intake.place(batch)
        self._actions.request(commands, self.tree.owner, self._lsn)
        self._placed(intake)

    def _place_begun(self, intake: Intake) -> None:
        if intake.under_way.batch is not None:
            intake.place_begun()
            self._placed(intake)

    def _placed(self, intake: Intake) -> None:
        if intake.errors:
            self._retry_later()
        if intake.kept:
            self._kept = [*self._kept, *intake.kept][-KEPT_SHOWN:]
            intake.kept.clear()

    def _retry_later(self) -> None:
        if not self._retry_at:
            self._retry_at = time.monotonic() + self._retries.failed()

    def _fetch(self, intake: Intake, batch: Batch) -> set[bytes] | None:
        """Stage what a batch needs; return the digests of what the owner does not have any more.

        None: a large file is left for what came meanwhile, and gone on with later from where it stands.
        """
        missing = intake.contents.missing(batch.needs)
        wanted = [(need.name, need.digest, offset, need.entry.size) for need, offset in missing]
        lost: set[bytes] = set()
        taken = 0
        pieces = self._client.contents(self.tree.owner, self.tree.name, wanted)
        try:
            for parts, data in pieces:
                taken += len(data)
                if taken > TURN_BYTES and batch.is_large and self._others_wait(intake):
                    return None
                at, view = 0, memoryview(data)
                for number, offset, size, last in parts:
                    need = missing[number][0]
                    piece, at = view[at : at + size], at + size
                    if offset < 0:
                        lost.add(need.digest)
                    if need.digest in lost:
                        continue
                    try:
                        intake.contents.stage(need, offset, piece, last=last)
                    except WrongContentError:
                        # The owner read it while it was written; it will announce the new content.
                        lost.add(need.digest)
                if intake.under_way.is_synced:
                    # The owner goes on sending meanwhile, as far as its credit reaches.
                    self._place_begun(intake)
        finally:
            pieces.close()
            intake.contents.let_go(large=False)
        return lost

    def _others_wait(self, intake: Intake) -> bool:
        if not self._news.empty():
            self._hear(intake)
        return intake.others_wait

    def _count(self, intake: Intake) -> None:
        status = self.status
        status.files, status.size = intake.held.files, intake.held.bytes
        behind = intake.behind or len(intake.postponed)
        status.note_behind(behind or int(self._compare_due))
        status.note_findings(intake.local.found.findings if intake.local is not None else {})
        status.alerts += [f"changed on this node, put back as its owner has it; kept in {path}" for path in self._kept]

    def _note(self, intake: Intake) -> None:
        self._count(intake)
        if intake.errors:
            first = next(iter(intake.errors.values()))
            more = len(intake.errors) - 1
            self.trouble(FilesError(first.message + (f", and {more} more" if more else ""), hint=first.hint))
        elif not intake.postponed:
            self._retries.succeeded()
            self.recovered()
        self._changed()
