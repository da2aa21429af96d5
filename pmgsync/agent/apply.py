"""The apply worker of one origin: takes its frames from the local broker and commits them in the local database."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from pmgsync.agent.apply_thread import ApplyThread
from pmgsync.agent.resync import Resync
from pmgsync.agent.worker import REPORT_S, SessionOverError, Worker
from pmgsync.config import NodeConfig
from pmgsync.core.document import Epoch
from pmgsync.core.frames import read_frames
from pmgsync.core.positions import Position
from pmgsync.errors import PmgsyncError, ResyncRequiredError, UnreachableError
from pmgsync.postgres.apply import Applier
from pmgsync.postgres.apply.stale import StaleTables
from pmgsync.profile_file import load_profile
from pmgsync.trace import hop
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

CREDIT_BYTES = 8 << 20
"""Bytes of frames that may wait here to be applied."""
ALERT_COUNT = 20


class ApplyWorker(Worker):
    """Keeps this node's database in step with one origin."""

    def __init__(self, config: NodeConfig, origin: int) -> None:
        super().__init__(config, f"apply:{origin}")
        self.origin = origin
        self._profile = load_profile(config.profile)
        self._stale = StaleTables(origin)

    def _history(self) -> Sequence[Epoch]:
        return self.document.history

    def _members(self) -> Collection[int]:
        return self.document.cids

    def session(self, link: BrokerLink) -> None:
        """Apply from the database's position on until something ends it."""
        applier = Applier(
            self.config.dsn,
            self._profile,
            origin=self.origin,
            own_cid=self.cid,
            history=self._history,
            members=self._members,
            stale=self._stale,
            waits=self.config.synchronous_commit,
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
        thread = ApplyThread(applier, self.wakeup)
        counted = Counter(self.counters)
        try:
            self._stream(link, thread, int(opened["id"]), incarnation, lambda: self._describe(applier, counted))
        except ResyncRequiredError as error:
            thread.stop()
            self._resynchronise(error)
        finally:
            thread.stop()
            self._describe(applier, counted)
            with contextlib.suppress(UnreachableError):  # a broker that is gone has no stream to close
                link.send({"op": "cancel", "id": int(opened["id"])})

    def _stream(
        self, link: BrokerLink, thread: ApplyThread, stream: int, incarnation: int, describe: Callable[[], None]
    ) -> None:
        waiter = Waiter(link.socket, wakeup=self.wakeup)
        while True:
            waiter.wait(REPORT_S)
            for received in link.pending():
                self._take(thread, stream, *received)
            newest, used = None, 0
            while (applied := thread.next_result()) is not None:
                newest, used = applied, used + applied.size
            if newest is not None:
                self.recovered()
                place = {"position": list(newest.durable), "visible": list(newest.visible)}
                link.send({"op": "applied", "origin": self.origin, "incarnation": incarnation, **place})
                link.send({"op": "credit", "id": stream, "bytes": used})
            elif thread.idle:
                # An error is over when something was applied, or there is nothing to apply; not because time passes.
                self.recovered()
            if self.report_due:
                describe()
                self.report()

    def _describe(self, applier: Applier, counted: Counter[str]) -> None:
        """Set what the next report says; `counted` is what sessions before this one have counted."""
        warnings = list(applier.stats.warnings)[-ALERT_COUNT:]
        self.alerts = [{"kind": "table", "text": warning} for warning in warnings]
        self.alerts += self._stale.alerts()[:ALERT_COUNT]
        self.alerts += [{"kind": "schema", "text": text} for text in applier.failures]
        self.counters = counted + Counter(dict(applier.stats.lost))

    def _take(self, thread: ApplyThread, stream: int, message: Message, attachments: Sequence[bytes]) -> None:
        if message["op"] == "frame" and message.get("id") == stream:
            for frame in read_frames(attachments):
                hop("received", frame.here.lsn)
                thread.submit(frame)
        elif message["op"] != "frame":
            self.handle(message, attachments)

    def _resynchronise(self, reason: ResyncRequiredError) -> None:
        log.warning("action=resync origin=%d tables=%s reason=%s", self.origin, list(reason.tables), reason)
        self.state = "S"
        self.alerts = [{"kind": "resync", "text": f"resynchronising from node {self.origin}: {reason.message}"}]
        assert self.link is not None
        resync = Resync(
            self.config,
            self._profile,
            origin=self.origin,
            own_cid=self.cid,
            document=self.document,
            tables=reason.tables,
            wakeup=self.wakeup,
        )
        waiter = Waiter(self.link.socket, wakeup=self.wakeup)
        try:
            while not resync.over:
                waiter.wait(REPORT_S)
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
        """Take the result. When a fetch of single tables has failed, it is tried again later and the chain goes on."""
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
