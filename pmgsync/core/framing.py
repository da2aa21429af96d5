"""The framer turns the pgoutput messages of one slot into frames of a chain. Pure; every message passes through once.

Each frame can be read on its own, holds whole transactions or one part of a large one, and is closed at `FRAME_BYTES`.
A lone transaction is a frame at once. Under load a frame that is not full waits until `FRAME_GAP_S` after the one
before, so that a stream of small transactions costs by its bytes and not by its number.

Relation messages are repeated before their first use in a frame, not all in front: a table that is described again in
the middle of a frame needs the old description before that point and the new one after it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from pmgsync.core.emitted import SealKey, is_own, unsealed
from pmgsync.core.frames import Frame, Header, make_frame
from pmgsync.core.positions import Position
from pmgsync.errors import ProtocolError

FRAME_BYTES = 64 << 10
"""A frame or part is closed when its messages have this many bytes. A thousand frames in a stalled subscriber's queue
are then 64 MiB; larger ones (256 KiB) gained nothing that could be measured."""

FRAME_GAP_S = 0.002
"""Seconds between two frames that are not full: at most 500 a second, and nobody waits longer than that. With a frame
per transaction, 100 000 small transactions cost as much in every broker as in the database. Sharing frames they come in
1 567 instead of some 100 000, and cost the receiving broker 0.7 instead of 5.9 CPU seconds."""

_UNIX_TO_POSTGRES_EPOCH_US = 946_684_800_000_000
_BEGIN = struct.Struct(">cQQI")
_COMMIT = struct.Struct(">cBQQQ")


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
        position: the end of the newest frame that was closed; the next frame follows it.
        passed: an LSN below which everything the server sent is in closed or collected frames (end of the newest
            transaction seen, kept or not).
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
        self.position = position
        self.passed = position.lsn + 1
        self.forged = 0
        self._relations: dict[bytes, bytes] = {}
        self._messages: list[bytes] = []
        self._seen: set[bytes] = set()
        self._size = 0
        self._changes = 0
        self._whole = Position(0)
        self._whole_time = 0
        # The transaction that is being read.
        self._begin: bytes | None = None
        self._in_transaction = False
        self._skip = False
        self._lsn = 0
        self._time = 0
        self._part = 0
        self._mark = 0
        self._mark_changes = 0
        self._front: dict[bytes, bytes] = {}

    @property
    def empty(self) -> bool:
        """True when nothing is collected that is not in a closed frame."""
        return not self._messages and not self._in_transaction

    @property
    def in_one(self) -> bool:
        """True between a transaction's Begin and its Commit, when no whole transaction is collected before it."""
        return self._in_transaction and not self._mark

    def feed(self, message: bytes) -> list[Frame]:
        """Take the server's next message and return the frames that it closes, mostly none.

        Raises:
            ProtocolError: when the message is not one that pgoutput version 1 sends at this point.
        """
        match message[:1]:
            case b"I" | b"U" | b"D":
                return self._change(message, (message[1:5],))
            case b"B":
                self._start(message)
            case b"C":
                return self._finish(message)
            case b"R":
                self._relations[message[1:5]] = message
                self._seen.discard(message[1:5])
            case b"T":
                relations = tuple(message[start : start + 4] for start in range(6, len(message), 4))
                return self._change(message, relations)
            case b"O":
                # Applied here from another origin's chain: that chain carries it to everybody.
                self._skip = True
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
        self._not_before = now + self._gap_s
        return self._close_whole()

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until `flush` closes a frame of what is collected; None when there is nothing to close."""
        return max(0.0, self._not_before - now) if self._mark else None

    def _start(self, message: bytes) -> None:
        if self._in_transaction or len(message) != _BEGIN.size:
            raise ProtocolError("the server sent a Begin that is malformed or inside a transaction")
        _, self._lsn, time, _ = _BEGIN.unpack(message)
        self._time = time + _UNIX_TO_POSTGRES_EPOCH_US
        self._begin, self._in_transaction, self._part = message, True, 0
        self._skip = self._lsn <= self.position.lsn
        self._mark, self._mark_changes = len(self._messages), self._changes
        self._front.clear()

    def _change(self, message: bytes, relations: tuple[bytes, ...]) -> list[Frame]:
        if not self._in_transaction:
            raise ProtocolError("the server sent a change outside a transaction")
        if self._skip:
            return []
        if self._begin is not None:
            self._append(self._begin)
            self._begin = None
        for relation in relations:
            if relation not in self._seen:
                definition = self._relations.get(relation)
                if definition is None:
                    raise ProtocolError("the server sent a change of a relation that it has not described")
                self._append(definition)
                self._seen.add(relation)
            elif self._mark and relation not in self._front:
                # Described before this transaction began; needed again should the two part into two frames.
                self._front[relation] = self._relations[relation]
        self._append(message)
        self._changes += 1
        if self._size < self._frame_bytes:
            return []
        frames = [self._close_whole()] if self._mark else []
        if self._size >= self._frame_bytes:
            self._part += 1
            frames.append(self._close(Position(self._lsn, self._part), self._time, self._messages, self._changes))
            self._clear()
        return frames

    def _finish(self, message: bytes) -> list[Frame]:
        if not self._in_transaction or len(message) != _COMMIT.size:
            raise ProtocolError("the server sent a Commit that is malformed or outside a transaction")
        _, _, commit_lsn, end_lsn, _ = _COMMIT.unpack(message)
        if commit_lsn != self._lsn:
            raise ProtocolError("the server sent a Commit of another transaction than its Begin")
        kept = self._begin is None and not self._skip
        self._in_transaction, self._begin = False, None
        self.passed = max(self.passed, end_lsn)
        if not kept:
            return []
        self._append(message)
        if self._part:
            frame = self._close(Position(self._lsn), self._time, self._messages, self._changes)
            self._clear()
            return [frame]
        self._whole, self._whole_time = Position(self._lsn), self._time
        self._mark, self._mark_changes = len(self._messages), self._changes
        return [self._close_whole()] if self._size >= self._frame_bytes else []

    def _append(self, message: bytes) -> None:
        self._messages.append(message)
        self._size += len(message)

    def _close_whole(self) -> Frame:
        """Close the frame of what stands before the mark; what follows it begins the next one."""
        rest, rest_changes = self._messages[self._mark :], self._changes - self._mark_changes
        frame = self._close(self._whole, self._whole_time, self._messages[: self._mark], self._mark_changes)
        described = {message[1:5] for message in rest if message[:1] == b"R"}
        front = list(self._front.values()) if rest else []
        # Only what was in force until now: a relation described anew since is to be written again before its next use.
        in_force = (described | set(self._front)) & self._seen if rest else set()
        self._clear()
        self._seen = in_force
        self._messages, self._changes = front + rest, rest_changes
        self._size = sum(map(len, self._messages))
        self._front.clear()
        return frame

    def _clear(self) -> None:
        self._messages, self._size, self._changes = [], 0, 0
        self._seen.clear()
        self._mark = self._mark_changes = 0

    def _close(self, here: Position, time: int, messages: list[bytes], changes: int) -> Frame:
        chain = self._chain
        header = Header(
            chain.cluster, chain.epoch, chain.origin, chain.incarnation,
            self.position, here, max(time, 0), chain.attempt, changes,
        )  # fmt: skip
        self.position = here
        return make_frame(header, messages)
