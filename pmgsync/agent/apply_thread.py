"""The thread that applies: it owns the database session, so that the worker reports even during long statements."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import AwaitedError, PmgsyncError, ResyncRequiredError
from pmgsync.postgres.apply import Applier
from pmgsync.trace import hop
from pmgsync.wire.waiting import Wakeup

log = logging.getLogger(__name__)

BATCH_BYTES = 1 << 20
"""Bytes of frames that are applied in one local transaction, when that many are waiting."""
FLUSH_IDLE_S = 0.05
"""What is visible is made durable when nothing more has come for so long, and every FLUSH_BUSY_S in any case."""
FLUSH_BUSY_S = 0.2
AWAIT_S = 0.1
"""Seconds between two looks at whether what a transaction waits for is there."""
REPORT_GAP_S = 0.02
"""Seconds between two reports of what was applied: one for each lone transaction would cost as much as applying it. The
broker tells the members every 50 ms, and in synchronous mode at once; then there is no gap."""
MAINTAIN_S = 2.0
"""Seconds between two looks at which stale tables can be fetched again."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done.

    Attributes:
        visible: the position that is committed and can be read.
        durable: the position that a crash of PostgreSQL cannot take back; with synchronous_commit the same.
        size: bytes of frames that led there.
        partial: changes of tables are left out, which are fetched later.
    """

    visible: Position
    durable: Position
    size: int
    partial: bool


class ApplyThread:
    """Applies frames in the order in which they are submitted; each result wakes the worker.

    Attributes:
        awaits: a sentence on what the next transaction waits for, "" when it waits for nothing.
    """

    def __init__(self, applier: Applier, wakeup: Wakeup, urgent: Callable[[], bool] = lambda: False) -> None:
        """Begin.

        Args:
            urgent: says whether commits wait for what is reported.
        """
        self._applier = applier
        self._wakeup = wakeup
        self._urgent = urgent
        self._frames: queue.SimpleQueue[tuple[Frame, float] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Applied | PmgsyncError] = queue.SimpleQueue()
        self._pending_bytes = 0
        self._unreported = 0
        self._stopping = threading.Event()
        self.awaits = ""
        applier.on_wait = self._report
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)
        self._thread.start()

    def submit(self, frame: Frame) -> None:
        """Have a frame applied."""
        self._pending_bytes += frame.size
        self._frames.put((frame, time.monotonic()))

    def next_result(self) -> Applied | None:
        """Return what was done next, None when there is nothing new.

        Raises:
            PmgsyncError: what ended the thread.
        """
        if self._results.empty():  # only the caller takes from it; an exception for it would cost 10 µs
            return None
        result = self._results.get()
        if isinstance(result, PmgsyncError):
            raise result
        self._pending_bytes -= result.size
        return result

    @property
    def idle(self) -> bool:
        """True when everything that was submitted is applied."""
        return self._pending_bytes == 0

    def stop(self) -> None:
        """End the thread; what it is doing is rolled back or done when this returns."""
        self._stopping.set()
        self._frames.put(None)
        self._applier.cancel()
        self._thread.join()
        self._applier.close()

    def _run(self) -> None:
        try:
            self._apply()
        except PmgsyncError as error:
            failed = error
        except Exception as error:  # a thread that just ended would look like a slave with nothing to do
            log.exception("action=apply-failed origin=%d", self._applier.origin)
            failed = PmgsyncError(f"applying failed unexpectedly ({type(error).__name__}: {error})")
        else:
            return
        if self._unreported:
            self._report()
        self._results.put(failed)
        self._wakeup.wake()

    def _apply(self) -> None:
        """Apply what is submitted until told to stop; raises whatever ends it early."""
        now = time.monotonic()
        maintain_at, flush_at, flush_latest, report_at = now + MAINTAIN_S, math.inf, math.inf, math.inf
        reported = -math.inf
        while True:
            now = time.monotonic()
            if now >= min(flush_at, flush_latest):
                self._applier.flush()
                flush_at = flush_latest = math.inf
                report_at = now
            if now >= report_at:
                self._report()
                reported, report_at = now, math.inf
            if now >= maintain_at:
                maintain_at = now + MAINTAIN_S
                if tables := self._applier.maintain():
                    reason = f"tables of node {self._applier.origin} can be kept in step again"
                    raise ResyncRequiredError(reason, tables=tables)
            try:
                due = min(maintain_at, flush_at, flush_latest, report_at)
                batch = self._next_batch(max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if batch is None:
                return
            frames, received = batch
            hop("begun", frames[-1].here.lsn)
            position = self._applied(frames, received)
            if position is None:
                return
            hop("committed", position.lsn)
            self._unreported += sum(frame.size for frame in frames)
            now = time.monotonic()
            if position != self._applier.durable:
                flush_at, flush_latest = now + FLUSH_IDLE_S, min(flush_latest, now + FLUSH_BUSY_S)
            report_at = now if self._urgent() else max(now, reported + REPORT_GAP_S)

    def _applied(self, batch: list[Frame], received: float) -> Position | None:
        """Apply a batch, which may have to wait for something else on this node; None when told to stop meanwhile."""
        while True:
            try:
                position = self._applier.apply(batch, received)
            except AwaitedError as error:
                if error.message != self.awaits:
                    log.info("action=await origin=%d reason=%s", self._applier.origin, error.message)
                self.awaits = error.message
                self._report()
                if self._stopping.wait(AWAIT_S):
                    return None
            else:
                self.awaits = ""
                return position

    def _report(self) -> None:
        partial = bool(self._applier.stale.waiting())
        self._results.put(Applied(self._applier.position, self._applier.durable, self._unreported, partial))
        self._unreported = 0
        self._wakeup.wake()

    def _next_batch(self, wait_s: float) -> tuple[list[Frame], float] | None:
        """Return the frames that are there and when the first came, None when the thread is to end; raises queue.Empty
        when none came.
        """
        item = self._frames.get(timeout=wait_s)
        batch: list[Frame] = []
        size, received = 0, 0.0
        while item is not None:
            frame, at = item
            received = received or at
            batch.append(frame)
            size += frame.size
            if size >= BATCH_BYTES or self._frames.empty():
                return batch, received
            item = self._frames.get()
        return None
