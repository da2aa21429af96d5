"""Streams: frames of a chain sent from a position on, as far as the credit reaches; local and remote alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from broker.journal.journals import Journals
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalDamagedError, PmgsyncError
from pmgsync.trace import hop

READ_BYTES = 1 << 20
"""Bytes read from the journal at a time."""
MESSAGE_BYTES, MESSAGE_FRAMES = 256 << 10, 500
"""Waiting frames are sent together, as many as fit: a small frame costs less than the message that carries it."""
STALLED_S = 60.0
"""A replay that gets no credit for so long is closed."""


@dataclass(slots=True, eq=False)
class Stream:
    """One receiver's place on one chain.

    Attributes:
        live: True for apply workers, whose stream has no end; False for a replay, which ends at the head.
        send: sends frames in one message; returns False when the receiver is gone.
        finish: called with the last position, or the error, when the stream is over.
    """

    origin: int
    position: Position
    credit: int
    live: bool
    send: Callable[[Sequence[Frame]], bool]
    finish: Callable[[Position, PmgsyncError | None], None]
    touched: float = field(default_factory=time.monotonic)


class Streams:
    """All streams that this broker serves from its journals."""

    def __init__(self, journals: Journals, damaged: Callable[[int, Position, JournalDamagedError], None]) -> None:
        """`damaged` is called with origin and position when the journal can never read what follows there."""
        self._journals = journals
        self._damaged = damaged
        self._by_owner: dict[tuple[object, int], Stream] = {}
        self._gathered: set[int] | None = None

    def open(self, owner: object, request: int, stream: Stream) -> None:
        """Begin a stream; one of the same owner and id is replaced."""
        self._by_owner[owner, request] = stream
        self.pump(stream)

    def add_credit(self, owner: object, request: int, size: int) -> None:
        """Give a stream more credit; one that is over already is ignored."""
        stream = self._by_owner.get((owner, request))
        if stream is not None:
            stream.credit += size
            stream.touched = time.monotonic()
            self.pump(stream)

    def close(self, owner: object, request: int) -> None:
        """End a stream; its receiver is told nothing."""
        self._by_owner.pop((owner, request), None)

    def close_owner(self, owner: object) -> None:
        """End all streams of a session or peer that is gone."""
        for key in [key for key in self._by_owner if key[0] == owner]:
            del self._by_owner[key]

    def count(self, owner: object) -> int:
        """Return how many streams an owner has open."""
        return sum(key[0] == owner for key in self._by_owner)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold back what is offered inside, and send it together at the end."""
        offered: set[int] = set()
        self._gathered = offered
        try:
            yield
        finally:
            self._gathered = None
            for stream in list(self._by_owner.values()):
                if stream.origin in offered:
                    self.pump(stream)

    def offer(self, frame: Frame) -> None:
        """Send a frame that the journal has just taken to every stream that waits for it."""
        if self._gathered is not None:
            self._gathered.add(frame.header.origin)
            return
        for stream in list(self._by_owner.values()):
            if stream.origin != frame.header.origin or stream.credit <= 0:
                continue
            if stream.position == frame.prev:
                self._send(stream, [frame])
            else:
                self.pump(stream)

    def fall_back(self, origin: int, complete: Position) -> None:
        """Move streams that stand in the middle of the transaction whose parts were dropped back to its start.

        A stream that is still in the middle of an earlier one stays: it would miss the rest of that.
        """
        for stream in self._by_owner.values():
            if stream.origin == origin and stream.position > complete and not stream.position.complete:
                stream.position = complete

    def fail(self, origin: int, error: PmgsyncError) -> None:
        """End every stream of a chain with an error."""
        for stream in [stream for stream in self._by_owner.values() if stream.origin == origin]:
            self._finish(stream, error)

    def pump(self, stream: Stream) -> None:
        """Send what the credit allows."""
        while stream.credit > 0:
            try:
                frames = self._journals.read(stream.origin, stream.position, min(stream.credit, READ_BYTES))
            except PmgsyncError as error:
                if isinstance(error, JournalDamagedError):
                    self._damaged(stream.origin, stream.position, error)
                self._finish(stream, error)
                return
            if frames and not self._send(stream, frames):
                return
            if not frames:
                if not stream.live:
                    self._finish(stream, None)
                return

    def expire(self) -> None:
        """Close finite streams whose receiver gives no credit any more."""
        horizon = time.monotonic() - STALLED_S
        for key, stream in list(self._by_owner.items()):
            if not stream.live and stream.credit <= 0 and stream.touched < horizon:
                del self._by_owner[key]

    def _send(self, stream: Stream, frames: Sequence[Frame]) -> bool:
        for together in messages(frames):
            hop("offered", together[-1].here.lsn)
            if not stream.send(together):
                self._forget(stream)
                return False
            stream.credit -= sum(frame.size for frame in together)
            stream.position = together[-1].here
            stream.touched = time.monotonic()
        return True

    def _finish(self, stream: Stream, error: PmgsyncError | None) -> None:
        self._forget(stream)
        stream.finish(stream.position, error)

    def _forget(self, stream: Stream) -> None:
        for key in [key for key, value in self._by_owner.items() if value is stream]:
            del self._by_owner[key]


def messages(frames: Sequence[Frame]) -> Iterator[Sequence[Frame]]:
    """Yield frames in order, in groups that fit into a message; a frame that is larger goes alone."""
    begun, size = 0, 0
    for number, frame in enumerate(frames):
        if number > begun and (size + frame.size > MESSAGE_BYTES or number - begun == MESSAGE_FRAMES):
            yield frames[begun:number]
            begun, size = number, 0
        size += frame.size
    if frames:
        yield frames[begun:]
