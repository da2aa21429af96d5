"""The own chain: what capture brings is journaled and published at once, and told to be durable when it is on disk.

While nothing is published the slot must advance past WAL without frames. If capture confirmed more than the journal
holds, the next start could not tell that from a journal that has lost its end. So the watermark is written to the
journal, and capture confirms up to what is on disk. At the start, a slot that was confirmed beyond both the journal's
newest frame and the watermark proves a hole.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from broker.chains.follower import Listener
from broker.heartbeats.heartbeat import OwnChain
from broker.journal.journals import Journals
from pmgsync.core.chains import Verdict
from pmgsync.core.frames import read_frame
from pmgsync.core.positions import Position
from pmgsync.errors import ProtocolError
from pmgsync.trace import hop

MARK_S = 0.05
"""Seconds between watermarks on disk: each costs an fsync, but capture asks the server on only when
the last one is there, and a stopping PostgreSQL waits for it."""


class Publishing:
    """This node's chain, from its broker's point of view.

    Attributes:
        chain: what the heartbeat says of it, None until capture has opened it.
    """

    def __init__(
        self,
        cid: int,
        cluster: bytes,
        journals: Journals,
        *,
        publish: Callable[[bytes, bytes], None],
        durable: Callable[[Position, int], None],
        listener: Listener,
    ) -> None:
        """Begin with no chain.

        Args:
            publish: sends a frame, header and body, to whoever listens.
            durable: called with position and watermark when more of the chain is on disk.
            listener: is told what the journal took.
        """
        self._cid = cid
        self._cluster = cluster
        self._journals = journals
        self._publish = publish
        self._durable = durable
        self._listener = listener
        self._told = (Position(0), 0)
        self._mark_at = 0.0
        self._marked = 0
        self.chain: OwnChain | None = None

    def open(self, incarnation: int, start: int, snapshot: bool) -> tuple[Position, int]:
        """Open the journal for capture.

        Returns:
            The complete position that it ends at, and the LSN up to which it is known to be whole. Both may be on their
            way to the disk: a journal that was opened just now is synced again first. What may be confirmed is `safe`.
        """
        head = self._journals.open(self._cid, incarnation, Position(start))
        if not head.position.complete:
            head = self._journals.drop_parts(self._cid)
            self._listener.fell_back(head)
        known = self.chain
        same = known is not None and known.incarnation == incarnation
        watermark = known.watermark if known and same else head.position.lsn
        self.chain = OwnChain(incarnation, start, snapshot, watermark)
        self._told, self._marked = (Position(0), 0), 0
        return head.position, max(self._journals.noted(self._cid), watermark if same else 0)

    def take(self, header: bytes, body: bytes, whole: int = 0) -> None:
        """Take a frame from capture.

        Args:
            whole: LSN below which nothing is to come that is not in the chain up to this frame, 0 when not told. It
                goes to disk with the frame: in synchronous mode a commit waits for it.

        Raises:
            PmgsyncError: when it cannot be taken; capture starts again from the journal's end.
        """
        frame = read_frame(header, body)
        hop("taken", frame.here.lsn)
        if frame.header.origin != self._cid or frame.header.cluster != self._cluster:
            raise ProtocolError("capture sent a frame of another chain")
        verdict = self._journals.accept(frame)
        if verdict is Verdict.DUPLICATE:
            return
        if whole and self.chain is not None and verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            self._mark(whole)
        if verdict not in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            raise ProtocolError(f"capture sent a frame that does not follow the journal ({verdict.value})")
        if verdict is Verdict.BEGIN_AGAIN:
            self._listener.fell_back(self._journals.chains()[self._cid])
        # Publishing need not wait for the disk: the WAL still has what a crash takes from the journal.
        self._publish(header, body)
        hop("published", frame.here.lsn)
        self._listener.taken(frame)

    def safe(self) -> tuple[Position, int]:
        """Return how far the chain is on disk, and the LSN up to which it is known to be whole there."""
        return self._journals.durable(self._cid), self._journals.marked(self._cid)

    def watermark(self, lsn: int, *, soon: bool = False) -> None:
        """Note how far capture knows that there is nothing more to send.

        Args:
            soon: commits may wait until it is on disk.
        """
        chain = self.chain
        if chain is not None and lsn > chain.watermark:
            self.chain = OwnChain(chain.incarnation, chain.start, chain.snapshot, lsn)
            if soon:
                self._mark(lsn)
            else:
                self.tick()

    def _mark(self, lsn: int) -> None:
        """Have a watermark written to disk, with what else there is to write."""
        chain = self.chain
        assert chain is not None
        if lsn > chain.watermark:
            self.chain = OwnChain(chain.incarnation, chain.start, chain.snapshot, lsn)
        if lsn > self._marked:
            self._marked = lsn
            self._journals.mark(self._cid, lsn)

    def tick(self) -> None:
        """Have the watermark written to disk: it lets the slot advance while nothing is published."""
        now = time.monotonic()
        if self.chain is not None and self.chain.watermark > self._marked and now >= self._mark_at:
            self._mark_at = now + MARK_S
            self._marked = self.chain.watermark
            self._journals.mark(self._cid, self._marked)

    def journal_moved(self) -> None:
        """Tell capture when more is on disk than it was told last."""
        if self.chain is not None and (safe := self.safe()) != self._told:
            self._told = safe
            self._durable(*safe)
