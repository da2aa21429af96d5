"""The apply worker of one origin: takes its frames from the local broker and commits them in the local database."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import zmq

from pmgsync.agent.resync import Resync
from pmgsync.agent.worker import REPORT_S, Bell, SessionOverError, Worker
from pmgsync.config import NodeConfig
from pmgsync.core.frames import Frame, read_frame
from pmgsync.core.positions import Position
from pmgsync.errors import PmgsyncError, ResyncRequiredError, UnreachableError
from pmgsync.postgres.apply import Applier
from pmgsync.postgres.apply.stale import StaleTables
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

CREDIT_BYTES = 8 << 20
"""Bytes of frames that may wait here to be applied."""
BATCH_BYTES = 1 << 20
"""Bytes of frames that are applied in one local transaction, when so many are waiting."""
ALERT_COUNT = 20
TEND_S = 2.0
"""So often it is seen whether stale tables can be fetched anew."""


@dataclass(frozen=True, slots=True)
class _Done:
    """What the applying thread has done: a position that is committed, bytes used up, or the error that stopped it."""

    position: Position | None
    size: int
    error: PmgsyncError | None = None


class _Hand:
    """The thread that holds the database connection, so that a long statement never silences the worker."""

    def __init__(self, applier: Applier, bell: Bell) -> None:
        self._applier = applier
        self._bell = bell
        self._work: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._given = 0
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)
        self._thread.start()

    def give(self, frame: Frame) -> None:
        """Have a frame applied."""
        self._given += frame.size
        self._work.put(frame)

    def take_done(self) -> _Done | None:
        """Return what was done next, None when there is nothing new."""
        try:
            done = self.done.get_nowait()
        except queue.Empty:
            return None
        self._given -= done.size
        return done

    @property
    def idle(self) -> bool:
        """True when everything that was given is applied."""
        return self._given == 0

    def stop(self) -> None:
        """End the thread; what it is doing is rolled back or done when this returns."""
        self._work.put(None)
        self._applier.cancel()
        self._thread.join()
        self._applier.close()

    def _run(self) -> None:
        try:
            self._work_on()
        except PmgsyncError as error:
            failed = error
        except Exception as error:  # a thread that ended without a word would look like a slave with nothing to do
            log.exception("action=apply-failed origin=%d", self._applier.origin)
            failed = PmgsyncError(f"applying failed unexpectedly ({type(error).__name__}: {error})")
        else:
            return
        self.done.put(_Done(None, 0, failed))
        self._bell.ring()

    def _work_on(self) -> None:
        """Apply what is given until told to stop; raises whatever ends it early."""
        next_tend = time.monotonic() + TEND_S
        while True:
            if time.monotonic() >= next_tend:
                next_tend = time.monotonic() + TEND_S
                if tables := self._applier.tend():
                    reason = f"tables of node {self._applier.origin} can be kept in step again"
                    raise ResyncRequiredError(reason, tables=tables)
            try:
                batch = self._next_batch(max(0.0, next_tend - time.monotonic()))
            except queue.Empty:
                continue
            if batch is None:
                return
            position = self._applier.apply(batch)
            self.done.put(_Done(position, sum(frame.size for frame in batch)))
            self._bell.ring()

    def _next_batch(self, wait_s: float) -> list[Frame] | None:
        """Return the frames that are there, None when the thread is to end; raises queue.Empty when none came."""
        frame = self._work.get(timeout=wait_s)
        batch: list[Frame] = []
        size = 0
        while frame is not None:
            batch.append(frame)
            size += frame.size
            if size >= BATCH_BYTES or self._work.empty():
                return batch
            frame = self._work.get()
        return None


class ApplyWorker(Worker):
    """Keeps this node's database in step with one origin."""

    def __init__(self, config: NodeConfig, origin: int) -> None:
        super().__init__(config, f"apply:{origin}")
        self.origin = origin
        self._profile = load_profile(config.profile)
        self._bell = Bell()
        self._stale = StaleTables(origin)

    def _master(self) -> int:
        return self.document.master

    def _members(self) -> Collection[int]:
        return self.document.cids

    def session(self, link: BrokerLink) -> None:
        """Apply from the database's position on until something ends it."""
        applier = Applier(
            self.config.dsn,
            self._profile,
            origin=self.origin,
            own_cid=self.cid,
            master=self._master,
            members=self._members,
            stale=self._stale,
        )
        try:
            known = applier.connect()
            incarnation, position = known if known is not None else (0, Position(0))
            try:
                opened, _ = link.request(
                    {
                        "op": "apply.open",
                        "origin": self.origin,
                        "incarnation": incarnation,
                        "position": list(position),
                        "credit": CREDIT_BYTES,
                    }
                )
            except ResyncRequiredError as error:
                applier.close()
                self._resynchronise(error)
                return
            if known is None:
                incarnation, position = int(opened["incarnation"]), Position.parse(opened["position"])
                applier.begin_chain(incarnation, position)
        except PmgsyncError:
            applier.close()
            raise
        log.info("action=apply origin=%d incarnation=%016x position=%s", self.origin, incarnation, position)
        self.state = "A"
        hand = _Hand(applier, self._bell)
        try:
            self._stream(link, hand, int(opened["id"]), incarnation, position, applier)
        except ResyncRequiredError as error:
            hand.stop()
            self._resynchronise(error)
        finally:
            hand.stop()
            with contextlib.suppress(UnreachableError):  # a broker that is gone has no stream to close
                link.send({"op": "cancel", "id": int(opened["id"])})

    def _stream(
        self, link: BrokerLink, hand: _Hand, stream: int, incarnation: int, position: Position, applier: Applier
    ) -> None:
        poller = zmq.Poller()
        poller.register(link.socket, zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        used = 0
        counted = Counter(self.counters)  # of the sessions before this one
        while True:
            poller.poll(round(REPORT_S * 1000))
            for received in link.pending():
                self._take(hand, stream, *received)
            self._bell.hush()
            moved = False
            while (done := hand.take_done()) is not None:
                if done.error is not None:
                    raise done.error
                assert done.position is not None
                moved, position, used = True, done.position, used + done.size
            if moved:
                self.well()
                applied = {"incarnation": incarnation, "position": list(position)}
                link.send({"op": "applied", "origin": self.origin, **applied})
                link.send({"op": "credit", "id": stream, "bytes": used})
                used = 0
            elif hand.idle:
                # Only what was applied ends an error, or that there is nothing to apply: not that it takes long.
                self.well()
            warnings = list(applier.stats.warnings)[-ALERT_COUNT:]
            self.alerts = [{"kind": "table", "text": warning} for warning in warnings]
            self.alerts += self._stale.alerts()[:ALERT_COUNT]
            self.alerts += [{"kind": "schema", "text": text} for text in applier.failures]
            self.counters = counted + Counter(dict(applier.stats.lost))
            self.report()

    def _take(self, hand: _Hand, stream: int, message: Message, attachments: Sequence[bytes]) -> None:
        if message["op"] == "frame" and message.get("id") == stream:
            hand.give(read_frame(attachments[0], attachments[1]))
        elif message["op"] != "frame":
            self.handle(message, attachments)

    def _resynchronise(self, reason: ResyncRequiredError) -> None:
        log.warning("action=resync origin=%d tables=%s reason=%s", self.origin, list(reason.tables), reason)
        self.state = "S"
        self.alerts = [{"kind": "resync", "text": f"resynchronising from node {self.origin}: {reason.message}"}]
        resync = Resync(self, self._bell, reason.tables)
        try:
            while not resync.over:
                poll = zmq.Poller()
                poll.register(self._bell.fileno(), zmq.POLLIN)
                assert self.link is not None
                poll.register(self.link.socket, zmq.POLLIN)
                poll.poll(round(REPORT_S * 1000))
                self._bell.hush()
                for received in self.link.pending():
                    self.waiting(*received)
                self.alerts = [{"kind": "resync", "text": resync.progress()}]
                self.report()
            self._conclude(resync, reason.tables)
        except SessionOverError:
            resync.cancel()
            raise
        finally:
            self.state, self.alerts = "A", []

    def _conclude(self, resync: Resync, tables: Sequence[tuple[bytes, bytes]]) -> None:
        """Take the result; a fetch of single tables that failed is tried again later, and the chain goes on."""
        try:
            resync.result()
        except UnreachableError as error:
            if not tables:
                raise
            log.warning("action=fetch-later origin=%d error=%s", self.origin, error)
            self._stale.unreachable(tables)
        except PmgsyncError as error:
            if not tables:
                raise
            log.warning("action=fetch-failed origin=%d tables=%s error=%s", self.origin, list(tables), error)
        else:
            self._stale.fetched(set(tables) - resync.stale)
