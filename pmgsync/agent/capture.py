"""The capture worker: WAL messages become frames, frames go to the broker, and what it has on disk is confirmed."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence

from pmgsync.agent.commit_hold import CommitHold
from pmgsync.agent.fence import Fence
from pmgsync.agent.lease import LeaseWorker
from pmgsync.agent.upkeep import Upkeep
from pmgsync.agent.worker import Worker
from pmgsync.config import NodeConfig
from pmgsync.core.frames import Frame
from pmgsync.core.framing import ChainName, Framer
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.positions import Position, format_lsn
from pmgsync.core.synchronous import Ends, confirmable
from pmgsync.errors import ChainBrokenError, PmgsyncError, UnreachableError
from pmgsync.postgres.setup.facts import read_node, renew_chain
from pmgsync.postgres.setup.node_row import NodeFacts
from pmgsync.postgres.wal.slot_reader import SlotReader, SlotState, emit_barrier, prove_continuity
from pmgsync.profile_file import load_profile
from pmgsync.trace import hop
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, error_map, pack
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20
"""Bytes of frames that may be on their way to the journal's disk; beyond it the WAL is left unread."""
READ_BATCH = 4_000
REST_MS = 1
"""For so long the rest of a transaction is waited for before anything else is looked at: the server sends each of its
messages by itself, and one round of the loop takes longer than reading all of them."""
RESTS = 10
PAUSE_S = 0.0002
"""While this many messages come at once, the server is let send so long before more are read. Each by itself wakes this
process: reading them took 2.2 µs each, and takes 1.2."""
BUSY_MESSAGES = 16
PAUSES = 10
CONFIRM_S = 1.0
WATERMARK_S = 0.1
WATERMARK_SOON_S = 0.01
"""The same while commits wait for it."""
ASK_S = 0.5
ASK_FAST_S = 0.02
ASK_FAST_FOR_S = 2.0
SLOT_CHECK_S = 10.0
RENEW_POLL_S = 0.2
RETAINED_ALERT_BYTES = 1 << 30

_FRAME = pack({"op": "frame"})


class CaptureWorker(Worker):
    """Publishes this node's chain."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config, "capture")
        self._facts: NodeFacts | None = None
        self._ends: tuple[int, Ends] | None = None
        fence = Fence()
        self.hold = CommitHold(config.dsn, self._place, fence)
        self.upkeep = Upkeep(config.dsn, load_profile(config.profile), self._place, fence, self.hold.may_open)
        self._lease = LeaseWorker(config, fence, self.hold)

    def ends_of(self, incarnation: int, position: Position, whole: int) -> Ends:
        """Return where the frames of a chain end; what earlier runs of this process know of it stays known."""
        known = self._ends
        if known is None or known[0] != incarnation or known[1].newest < position:
            known = self._ends = incarnation, Ends(position, whole)
        known[1].passed(whole)
        return known[1]

    def _place(self) -> tuple[int, ClusterDocument] | None:
        """Return this node's CID and the newest document that one of the two sessions has brought."""
        known = [(one.cid, one.signed.document) for one in (self, self._lease) if one.signed is not None]
        return max(known, key=lambda one: one[1].version, default=None)

    def session(self, link: BrokerLink) -> None:
        """Stream from the journal's end until something ends it."""
        self.upkeep.start()
        self._lease.start()
        self.hold.start()
        facts, state = read_node(self.config.dsn)
        opened, _ = link.request(
            {
                "op": "chain.open",
                "incarnation": facts.incarnation,
                "start": facts.start,
                "snapshot": facts.needs_snapshot,
            }
        )
        position, whole = Position.parse(opened["position"]), int(opened["watermark"])
        try:
            reader, state = self._acquire(facts, state, position, whole)
        except ChainBrokenError as error:
            log.error("action=chain-broken position=%s error=%s", position, error)
            self.fail(error)
            self._renew(facts)
            return
        try:
            log.info("action=capture incarnation=%016x position=%s", facts.incarnation, position)
            stream = _Stream(self, link, reader, facts, position, whole, state)
            try:
                stream.run()
            finally:
                stream.send_last_watermark()
        finally:
            reader.close()

    def _acquire(
        self, facts: NodeFacts, state: SlotState, position: Position, whole: int
    ) -> tuple[SlotReader, SlotState]:
        """Begin to read the slot, which continues exactly what the journal holds.

        Raises:
            ChainBrokenError: when it does not, or may not.
            UnreachableError: when the server does not answer, or the slot is in use.
        """

        def prove(found: SlotState) -> None:
            prove_continuity(
                found, system_id=facts.system_id, timeline=facts.timeline, journal_lsn=position.lsn, whole_lsn=whole
            )

        prove(state)
        start = max(position.lsn + 1, whole)
        reader = SlotReader(self.config.dsn, slot=facts.slot, publication=facts.publication, start_lsn=start)
        try:
            # From here on nobody else can read the slot. Until here somebody could, and the server silently skips what
            # that reader has confirmed.
            again, state = read_node(self.config.dsn)
            if again.incarnation != facts.incarnation:
                raise UnreachableError("another process has begun a new chain of this database just now")
            prove(state)
        except BaseException:
            reader.close()
            raise
        return reader, state

    def _renew(self, facts: NodeFacts) -> None:
        """Begin a new chain, and go on reporting: making the slot waits for every open transaction."""
        failed: list[PmgsyncError] = []

        def renew() -> None:
            try:
                renew_chain(self.config.dsn, facts)
            except PmgsyncError as error:
                failed.append(error)

        thread = threading.Thread(target=renew, name="renew", daemon=True)
        thread.start()
        while thread.is_alive():
            self.rest(RENEW_POLL_S)
        if failed:
            raise failed[0]


class _Stream:
    """One run of capture: a replication connection and a session with the broker."""

    def __init__(
        self,
        worker: CaptureWorker,
        link: BrokerLink,
        reader: SlotReader,
        facts: NodeFacts,
        position: Position,
        whole: int,
        state: SlotState,
    ) -> None:
        document = worker.document
        self._worker = worker
        self._link = link
        self._reader = reader
        self._facts = facts
        chain = ChainName(
            document.cluster, document.epoch, worker.cid, facts.incarnation, secrets.randbits(62) + 1
        )  # fmt: skip
        self._framer = Framer(chain, position, key=facts.seal_key)
        self._outstanding: deque[tuple[Position, int]] = deque()
        self._outstanding_bytes = 0
        # What the journal has may not be on its disk yet: the broker tells.
        self._safe = 0
        self._ends = worker.ends_of(facts.incarnation, position, max(whole, position.lsn + 1))
        self._told_proven: bool | None = None
        self._watermark = 0
        self._next_confirm = self._next_watermark = self._next_ask = 0.0
        self._next_slot_check = time.monotonic() + SLOT_CHECK_S
        self._ask_fast_until = 0.0
        self._slot_alerts: list[dict[str, str]] = []
        self._told_forged = 0
        self._check(state)

    def run(self) -> None:
        """Stream until an error ends it."""
        link, reader = self._link, self._reader
        link.send({"op": "serve", "methods": ["barrier"]})
        waiter = Waiter(link, reader.fileno())
        reading = True
        while True:
            drained = True
            if reading:
                drained = self._read()
            if self._worker.hold.stands:
                self._serve_commits(drained and reading)
            waiter.wait(self._pause_s() if drained else 0)
            for received in link.pending():
                self._take(*received)
            room = self._outstanding_bytes < WINDOW_BYTES
            if room != reading:
                reading = room
                (waiter.watch if room else waiter.ignore)(reader.fileno())
            self._keep_time(drained and reading)
            worker = self._worker
            if worker.report_due:
                worker.alerts = [*self._slot_alerts, *self._forged(), *worker.upkeep.alerts, *worker.hold.alerts]
                worker.report()

    def _forged(self) -> list[dict[str, str]]:
        """Return the alert that somebody else writes messages under pmgsync's prefixes."""
        count = self._framer.forged
        if not count:
            return []
        if count != self._told_forged:
            self._told_forged = count
            log.warning("action=forged-message count=%d", count)
        text = f"{count} logical messages in pmgsync's name were not written by pmgsync, and were dropped"
        return [{"kind": "forged", "text": text}]

    def send_last_watermark(self) -> None:
        """Tell the broker how far the server had come: psycopg2 answers a server that stops with that LSN."""
        if self._framer.empty:
            with contextlib.suppress(UnreachableError):
                lsn = max(self._framer.passed, self._reader.caught_up_lsn)
                self._link.send({"op": "watermark", "lsn": lsn})

    def _pause_s(self) -> float:
        now = time.monotonic()
        pause = ASK_FAST_S if now < self._ask_fast_until else WATERMARK_S
        if self._worker.hold.stands and now < self._next_watermark:
            pause = min(pause, self._next_watermark - now)
        company = self._framer.wait_s(now)
        return pause if company is None else min(pause, company)

    def _read(self) -> bool:
        """Read what is there, at most a batch; True when the server has sent no more."""
        framer, reader, rests, pauses = self._framer, self._reader, RESTS, PAUSES
        before, end = reader.taken, reader.taken + READ_BATCH
        while reader.taken < end:
            for frame in framer.feed(reader.messages()):
                self._send(frame)
            if self._outstanding_bytes >= WINDOW_BYTES:
                return False
            if not reader.drained:
                continue
            if (frame := framer.flush(time.monotonic())) is not None:  # type: ignore[assignment]
                self._send(frame)
            if pauses and reader.taken - before >= BUSY_MESSAGES and not self._worker.hold.stands:
                pauses, before = pauses - 1, reader.taken
                time.sleep(PAUSE_S)
            elif rests and framer.in_one and reader.wait(REST_MS):
                rests -= 1
            else:
                return True
        return False

    def _send(self, frame: Frame) -> None:
        hop("captured", frame.here.lsn)
        head, end = _FRAME, self._framer.passed
        if self._worker.hold.stands and frame.here.complete:
            head = pack({"op": "frame", "whole": end})
        self._link.put((head, frame.header_bytes, frame.body))
        self._ends.sent(frame.here, end)
        self._outstanding.append((frame.here, frame.size))
        self._outstanding_bytes += frame.size

    def _take(self, message: Message, attachments: Sequence[bytes]) -> None:
        match message["op"]:
            case "durable":
                self._durable(Position.parse(message["position"]), int(message["watermark"]))
            case "synchronous":
                self._worker.hold.heard(message)
            case "call" if message.get("method") == "barrier":
                self._barrier(message)
            case "cancel" | "credit":
                pass
            case _:
                self._worker.handle(message, attachments)

    def _durable(self, position: Position, watermark: int) -> None:
        while self._outstanding and self._outstanding[0][0] <= position:
            self._outstanding_bytes -= self._outstanding.popleft()[1]
        # After a crash, a transaction of which only some parts are on disk is sent again: it is not safe yet.
        complete = position.lsn + 1 if position.complete else 0
        self._safe = max(self._safe, complete, watermark)
        self._worker.recovered()

    def _barrier(self, message: Message) -> None:
        request = int(message["id"])
        try:
            lsn = emit_barrier(self._worker.config.dsn)
        except PmgsyncError as error:
            self._link.send(error_map(request, error))
            return
        self._link.send({"op": "done", "id": request, "result": {"lsn": lsn}})
        self._ask_fast_until = time.monotonic() + ASK_FAST_FOR_S

    def _keep_time(self, caught_up: bool) -> None:
        now = time.monotonic()
        if (proven := self._worker.hold.proven) != self._told_proven:
            self._told_proven = proven
            self._link.send({"op": "synchronous.told", "stands": proven})
        if now >= self._next_confirm:
            self._next_confirm = now + CONFIRM_S
            # Feedback goes out even when nothing is new: the server ends connections that are silent for a minute.
            self._reader.confirm(self._confirmable())
        self._tell_watermark(now, caught_up)
        if caught_up and now >= self._next_ask:
            self._next_ask = now + (ASK_FAST_S if now < self._ask_fast_until else ASK_S)
            self._reader.confirm(self._confirmable(), ask=True)
        if now >= self._next_slot_check:
            self._next_slot_check = now + SLOT_CHECK_S
            self._check(read_node(self._worker.config.dsn)[1])

    def _confirmable(self) -> int:
        position = self._worker.hold.position(self._facts.incarnation)
        return confirmable(position, self._ends, safe=self._safe, confirmed=self._reader.confirmed)

    def _tell_watermark(self, now: float, caught_up: bool) -> None:
        if not caught_up or not self._framer.empty or now < self._next_watermark:
            return
        lsn = max(self._framer.passed, self._reader.caught_up_lsn)
        if lsn > self._watermark:
            soon = self._worker.hold.stands
            self._next_watermark = now + (WATERMARK_SOON_S if soon else WATERMARK_S)
            self._watermark = lsn
            self._ends.passed(lsn)
            self._link.send({"op": "watermark", "lsn": lsn, "soon": soon})

    def _serve_commits(self, caught_up: bool) -> None:
        """Let commits return that may, while the server waits for this capture."""
        self._tell_watermark(time.monotonic(), caught_up)
        lsn = self._confirmable()
        if lsn > self._reader.confirmed:
            self._reader.confirm(lsn, commits_wait=True)

    def _check(self, state: SlotState) -> None:
        alerts = []
        if state.retained_bytes > RETAINED_ALERT_BYTES:
            text = f"the slot keeps {state.retained_bytes >> 20} MiB of WAL, from {format_lsn(state.restart_lsn)} on"
            alerts.append({"kind": "slot", "text": text})
        if state.wal_status in {"unreserved", "lost"}:
            alerts.append({"kind": "slot", "text": f"the slot's wal_status is {state.wal_status}"})
        self._slot_alerts = alerts
