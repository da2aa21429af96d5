"""The framer turns the pgoutput messages of one slot into frames of a chain. Pure; every message passes through once.

Each frame can be read on its own, holds whole transactions or one part of a large one, and is closed at `FRAME_BYTES`.
A lone transaction is a frame at once, also when it follows another lone one: a client that waits for each on the other
node must not wait for company that does not come. Under load, once a frame held more than one, a frame that is not full
waits until `FRAME_GAP_S` after the one before, so that a stream of small transactions costs by its bytes and not by its
number.

Relation messages are repeated before their first use in a frame, not all in front: a table that is described again in
the middle of a frame needs the old description before that point and the new one after it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pmgsync.core.emitted import SealKey, is_own, unsealed
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import LAST, Position
from pmgsync.errors import ProtocolError

FRAME_BYTES = 64 << 10
"""A frame or part is closed when its messages have this many bytes. A thousand frames in a stalled subscriber's queue
are then 64 MiB; larger ones (256 KiB) gained nothing that could be measured."""

FRAME_GAP_S = 0.002
"""Seconds between two frames that are not full: at most 500 a second, and nobody waits longer than that. With a frame
per transaction, 100 000 small transactions cost as much in every broker as in the database. Sharing frames they come in
1 567 instead of some 100 000, and cost the receiving broker 0.7 instead of 5.9 CPU seconds."""
LONE_SHARE = 4
"""The gap is a share of that after a frame with one transaction. Where the machine does not keep up with so many,
more than one is there when capture comes to read, and the gap is the whole again."""

_UNIX_TO_POSTGRES_EPOCH_US = 946_684_800_000_000
_BEGIN = struct.Struct(">xQQI")
_COMMIT_BYTES = 26
_B, _C = ord("B"), ord("C")
_ROWS = b"IUD"


@dataclass(frozen=True, slots=True)
class ChainName:
    """What every frame of one run of capture has in common."""

    cluster: bytes
    epoch: int
    origin: int
    incarnation: int
    attempt: int


class Framer:
    """Collects messages and closes frames.

    Attributes:
        forged: messages in pmgsync's name that were dropped because pmgsync has not written them.
    """

    def __init__(
        self,
        chain: ChainName,
        position: Position,
        *,
        key: SealKey,
        frame_bytes: int = FRAME_BYTES,
        gap_s: float = FRAME_GAP_S,
    ) -> None:
        """Begin after a position.

        Args:
            key: what this node's database seals the messages of pmgsync's own with.
        """
        self._chain = chain
        self._key = key
        self._frame_bytes = frame_bytes
        self._gap_s = gap_s
        self._not_before = -math.inf
        self._position, self._passed = position, (position.lsn + 1).to_bytes(8, "big")
        self._position_lsn = position.lsn.to_bytes(8, "big")
        self.forged = 0
        self._relations: dict[bytes, bytes] = {}
        # What is collected, and of that: where its descriptions stand, what is described, and how the changes begin
        # that need nothing written before them.
        self._messages: list[bytes] = []
        self._described_at: list[int] = []
        self._seen: set[bytes] = set()
        self._plain: set[bytes] = set()
        self._size = 0
        self._changes = 0
        # Whole transactions: how far they reach, and the Begin of the last.
        self._mark = 0
        self._mark_changes = 0
        self._whole = b""
        # The transaction that is being read.
        self._begin = b""
        self._in_transaction = False
        self._skip = False
        self._part = 0

    @property
    def position(self) -> Position:
        """The end of the newest frame that was closed; the next frame follows it."""
        return self._position

    @property
    def passed(self) -> int:
        """An LSN below which everything the server sent is in closed or collected frames: the end of the newest
        transaction seen, kept or not."""
        return int.from_bytes(self._passed, "big")

    @property
    def empty(self) -> bool:
        """True when nothing is collected that is not in a closed frame."""
        return not self._messages and not self._in_transaction

    @property
    def in_one(self) -> bool:
        """True between a transaction's Begin and its Commit, when no whole transaction is collected before it."""
        return self._in_transaction and not self._mark

    def feed(self, messages: Iterable[bytes]) -> Iterator[Frame]:
        """Take the server's next messages and yield the frames that they close; it has to be read to its end.

        Raises:
            ProtocolError: when one is not what pgoutput version 1 sends at this point.
        """
        left = iter(messages)
        while frames := self._take(left):
            yield from frames

    def _take(self, messages: Iterator[bytes]) -> list[Frame]:
        """Take messages until they close frames, or are all taken.

        Nearly all are changes, Begins and Commits, and touch little but local variables.
        """
        collected, plain, limit = self._messages, self._plain, self._frame_bytes
        begin, passed, size, changes = self._begin, self._passed, self._size, self._changes
        inside, skips = self._in_transaction, self._skip
        try:
            for message in messages:
                if inside and not skips and message[:5] in plain:
                    collected.append(message)
                    changes += 1
                    size += len(message)
                    if size < limit:
                        continue
                    self._begin, self._size, self._changes = begin, size, changes
                    frames = self._full()
                    size, changes = self._size, self._changes
                    return frames
                kind = message[0] if message else 0
                if kind == _B:
                    if inside or len(message) != _BEGIN.size:
                        raise ProtocolError("the server sent a Begin that is malformed or inside a transaction")
                    inside, begin = True, message
                    skips = message[1:9] <= self._position_lsn
                    self._mark, self._mark_changes, self._part = len(collected), changes, 0
                    if not skips:
                        collected.append(message)
                        size += len(message)
                elif kind == _C:
                    if not inside or len(message) != _COMMIT_BYTES:
                        raise ProtocolError("the server sent a Commit that is malformed or outside a transaction")
                    if message[2:10] != begin[1:9]:
                        raise ProtocolError("the server sent a Commit of another transaction than its Begin")
                    inside = False
                    passed = max(passed, message[10:18])
                    if skips:
                        continue
                    if not self._part and collected[-1] is begin:
                        # Nothing in it is for the others.
                        size -= len(collected.pop())
                        continue
                    collected.append(message)
                    size += len(message)
                    if not self._part:
                        self._whole, self._mark, self._mark_changes = begin, len(collected), changes
                        if size < limit:
                            continue
                    self._begin, self._size, self._changes = begin, size, changes
                    frame = self._close_part(LAST) if self._part else self._close_whole()
                    size, changes = self._size, self._changes
                    return [frame]
                elif not skips or kind not in _ROWS:
                    self._begin, self._size, self._changes = begin, size, changes
                    self._in_transaction, self._skip = inside, skips
                    frames = self._other(message)
                    size, changes, skips = self._size, self._changes, self._skip
                    if frames:
                        return frames
                elif not inside:
                    raise ProtocolError("the server sent a change outside a transaction")
        finally:
            self._begin, self._passed, self._size, self._changes = begin, passed, size, changes
            self._in_transaction, self._skip = inside, skips
        return []

    def _other(self, message: bytes) -> list[Frame]:
        match message[:1]:
            case b"I" | b"U" | b"D":
                frames = self._change(message, (message[1:5],))
                if message[1:5] in self._seen:
                    self._plain.add(message[:5])
                return frames
            case b"R":
                relation = message[1:5]
                self._relations[relation] = message
                self._seen.discard(relation)
                self._plain.difference_update([b"%c%s" % (kind, relation) for kind in _ROWS])
            case b"T":
                return self._change(message, _relations_of(message))
            case b"O":
                # Applied here from another origin's chain: that chain carries it to everybody.
                self._drop()
            case b"M":
                if is_own(message):
                    kept = unsealed(message, self._key)
                    if kept is not None:
                        return self._change(kept, ())
                    self.forged += 1
            case b"Y":
                pass
            case kind:
                raise ProtocolError(f"the server sent a message of the unknown kind {kind!r}")
        return []

    def flush(self, now: float) -> Frame | None:
        """Close the frame of the whole transactions collected; None when there are none, or they wait for company.

        Args:
            now: seconds, by a clock that never goes back.
        """
        if not self._mark or now < self._not_before:
            return None
        first = next(message for message in self._messages if message[:1] == b"B")
        self._not_before = now + (self._gap_s / LONE_SHARE if first is self._whole else self._gap_s)
        return self._close_whole()

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until `flush` closes a frame of what is collected; None when there is nothing to close."""
        return max(0.0, self._not_before - now) if self._mark else None

    def _drop(self) -> None:
        """Leave out the transaction that is being read."""
        if self._in_transaction and not self._skip:
            if self._part or self._messages[-1] is not self._begin:
                raise ProtocolError("the server sent an Origin behind a change")
            self._size -= len(self._messages.pop())
        self._skip = True

    def _change(self, message: bytes, relations: tuple[bytes, ...]) -> list[Frame]:
        if not self._in_transaction:
            raise ProtocolError("the server sent a change outside a transaction")
        if self._skip:
            return []
        for relation in relations:
            if relation not in self._seen:
                definition = self._relations.get(relation)
                if definition is None:
                    raise ProtocolError("the server sent a change of a relation that it has not described")
                self._described_at.append(len(self._messages))
                self._append(definition)
                self._seen.add(relation)
        self._append(message)
        self._changes += 1
        return self._full() if self._size >= self._frame_bytes else []

    def _full(self) -> list[Frame]:
        """Close what is collected, in a transaction."""
        frames = [self._close_whole()] if self._mark else []
        if self._size >= self._frame_bytes:
            self._part += 1
            frames.append(self._close_part(self._part))
        return frames

    def _append(self, message: bytes) -> None:
        self._messages.append(message)
        self._size += len(message)

    def _close_part(self, part: int) -> Frame:
        """Close the frame of the last part of a transaction, or another."""
        lsn, time, _ = _BEGIN.unpack(self._begin)
        frame = self._close(Position(lsn, part), time, self._messages, self._changes)
        self._clear()
        return frame

    def _close_whole(self) -> Frame:
        """Close the frame of what stands before the mark; what follows it begins the next one."""
        whole, rest = self._messages[: self._mark], self._messages[self._mark :]
        rest_changes = self._changes - self._mark_changes
        lsn, time, _ = _BEGIN.unpack(self._whole)
        frame = self._close(Position(lsn), time, whole, self._mark_changes)
        # Tables that were described before this transaction began.
        front: dict[bytes, bytes] = {}
        described: set[bytes] = set()
        for message in rest:
            if message[:1] == b"R":
                described.add(message[1:5])
            else:
                front |= {relation: b"" for relation in _relations_of(message) if relation not in described}
        for at in self._described_at:
            if at < self._mark and self._messages[at][1:5] in front:
                front[self._messages[at][1:5]] = self._messages[at]
        # Only what was in force until now: a relation described anew since is to be written again before its next use.
        in_force = (described | set(front)) & self._seen
        self._clear()
        self._seen = in_force
        self._messages, self._changes = [*front.values(), *rest], rest_changes
        self._described_at = [at for at, message in enumerate(self._messages) if message[:1] == b"R"]
        self._size = sum(map(len, self._messages))
        return frame

    def _clear(self) -> None:
        self._messages, self._described_at, self._size, self._changes = [], [], 0, 0
        self._seen.clear()
        self._plain.clear()
        self._mark = self._mark_changes = 0

    def _close(self, here: Position, time: int, messages: list[bytes], changes: int) -> Frame:
        chain = self._chain
        header = Header(
            chain.cluster, chain.epoch, chain.origin, chain.incarnation,
            self._position, here, max(time + _UNIX_TO_POSTGRES_EPOCH_US, 0), chain.attempt, changes,
        )  # fmt: skip
        self._position, self._position_lsn = here, here.lsn.to_bytes(8, "big")
        return make_frame(header, messages)


def _relations_of(change: bytes) -> tuple[bytes, ...]:
    """Return the tables of a message, as they stand in it."""
    if change[:1] in (b"I", b"U", b"D"):
        return (change[1:5],)
    if change[:1] == b"T":
        return tuple(change[start : start + 4] for start in range(6, len(change), 4))
    return ()
