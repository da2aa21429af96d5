"""The follower of one foreign chain: it takes live frames, detects gaps, and asks for a replay that fills them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from broker.chains.sources import forgotten_by_all, sources
from broker.heartbeats.heartbeat import DOWN_AFTER_S
from broker.journal.journals import Journals
from broker.members.members import Members
from pmgsync.core.chains import ChainHead, Verdict
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalError, PmgsyncError, ResyncRequiredError
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

REPLAY_CREDIT = 4 << 20
"""Bytes of a replay that may be under way at once."""
AHEAD_BYTES = 8 << 20
"""Live frames kept while the gap before them is being filled; beyond that they are fetched again."""
JOURNAL_BACKLOG = 32 << 20
"""Bytes waiting for the disk above which a replay is given no more credit."""
SILENCE_S = 10.0
"""A replay that has credit and brings nothing new for so long is begun again, from another member if there is one."""
RETRY_S = 1.0


class Listener(Protocol):
    """Is told what a follower does with its chain."""

    def taken(self, frame: Frame) -> None:
        """Called with every frame that the journal took, in order."""

    def fell_back(self, head: ChainHead) -> None:
        """Called when the parts of a half transaction were dropped."""

    def begun_further_on(self, origin: int) -> bool:
        """Called when the others have forgotten what follows the journal's head.

        Begin the journal where apply stands, if that is further on, and return True; else do nothing.
        """

    def lost(self, origin: int, error: PmgsyncError) -> None:
        """Called when no member can fill a gap any more."""


@dataclass(slots=True)
class _Replay:
    request: int
    server: int
    begun: Position
    heard: float
    owed: int = 0


class Follower:
    """The state of one foreign chain in this broker."""

    def __init__(
        self, origin: int, journals: Journals, members: Members, new_id: Callable[[], int], listener: Listener
    ) -> None:
        self.origin = origin
        self._journals = journals
        self._members = members
        self._new_id = new_id
        self._listener = listener
        self._ahead: dict[Position, Frame] = {}
        self._ahead_bytes = 0
        self._replay: _Replay | None = None
        self._known_head: Position | None = None
        self._head_heard = time.monotonic()
        self._retry_at = 0.0
        self._refused: dict[int, float] = {}
        self._gaps = self._duplicates = self._damaged = 0
        self._held = False

    def hold(self) -> None:
        """Take no more frames until `release`: this node fixes where it leaves the chain."""
        if not self._held:
            self._held = True
            self._forget_replay()
            self._ahead.clear()
            self._ahead_bytes = 0

    def release(self) -> None:
        """Go on; what came meanwhile is fetched."""
        if self._held:
            self._held = False
            self.try_again()

    @property
    def replaying(self) -> bool:
        """True while a gap is being filled."""
        return self._replay is not None

    @property
    def counters(self) -> dict[str, int]:
        """What was counted since the broker was started: gaps, duplicates, and frames that were damaged on the way."""
        return {"gaps": self._gaps, "duplicates": self._duplicates, "damaged": self._damaged}

    def count_damaged(self) -> None:
        """Count a frame that did not match its checksum."""
        self._damaged += 1

    def _head(self) -> ChainHead:
        return self._journals.chains()[self.origin]

    def live(self, frame: Frame) -> None:
        """Take a frame that came over PUB/SUB."""
        if self._held:
            return
        verdict = self._offer(frame)
        if verdict in {Verdict.GAP, Verdict.DROP_PARTS}:
            self._keep_ahead(frame)
            self._fill()

    def replayed(self, request: int, frame: Frame) -> None:
        """Take a frame that came as part of a replay."""
        replay = self._replay
        if replay is None or replay.request != request:
            return
        replay.owed += frame.size
        verdict = self._offer(frame)
        if verdict is Verdict.GAP:
            # The server's frames do not follow our journal, and neither can what it sends after them.
            self._abandon(f"member {replay.server} sent frames that do not follow {self._head().position}")
            return
        if verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            # Duplicates count as silence: a member could send them for ever.
            replay.heard = time.monotonic()
        self._give_credit()

    def ended(self, request: int) -> None:
        """The server has sent all it had."""
        replay = self._replay
        if replay is None or replay.request != request:
            return
        self._replay = None
        self._drain_ahead()
        if self._head().position == replay.begun:
            # The server says that it has more than it sends. Asking it again at once would go on for ever.
            self._avoid(replay.server)
        self._fill_if_behind()

    def failed(self, request: int, error: PmgsyncError) -> None:
        """The server refused or broke off."""
        replay = self._replay
        if replay is None or replay.request != request:
            return
        self._replay = None
        log.warning(
            "action=replay-refused origin=%d server=%d position=%s error=%s",
            self.origin, replay.server, self._head().position, error,
        )  # fmt: skip
        if not self._avoid(replay.server) and isinstance(error, ResyncRequiredError):
            self._listener.lost(self.origin, error)

    def heard_head(self, head: Position) -> None:
        """Note where the chain's newest frame ends, by a heartbeat. PUB keeps the order: what is missing is lost."""
        self._known_head, self._head_heard = head, time.monotonic()
        self._fill_if_behind()

    def tick(self) -> None:
        """Check time-outs, credit that was held back, and refusals that are over."""
        now = time.monotonic()
        self._refused = {cid: until for cid, until in self._refused.items() if until > now}
        if self._replay is None:
            self._fill_if_behind()
        elif now - self._replay.heard > SILENCE_S:
            self._abandon(f"member {self._replay.server} sent nothing that helps for {SILENCE_S:.0f} s")
        else:
            self._give_credit()

    def try_again(self) -> None:
        """Ask for what is missing now: there is somebody to ask."""
        self._retry_at = 0.0
        self._fill_if_behind()

    def server_gone(self, cid: int) -> None:
        """Forget a replay by a member whose connection was replaced: it will not go on."""
        if self._replay is not None and self._replay.server == cid:
            self._replay = None

    def reset(self) -> None:
        """Forget what is under way, after the journal was begun anew at another position."""
        self._ahead.clear()
        self._ahead_bytes = 0
        self._refused.clear()
        self._retry_at = 0.0
        self._forget_replay()
        self._fill_if_behind()

    def _forget_replay(self) -> None:
        if self._replay is not None:
            self._members.send(self._replay.server, {"op": "cancel", "id": self._replay.request})
            self._replay = None

    def _offer(self, frame: Frame) -> Verdict:
        verdict = self._take(frame)
        if verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            self._drain_ahead()
        elif verdict is Verdict.DUPLICATE:
            self._duplicates += 1
        elif verdict is Verdict.GAP:
            self._gaps += 1
        return verdict

    def _take(self, frame: Frame) -> Verdict:
        """Have the journal judge a frame, and the streams follow it."""
        try:
            verdict = self._journals.accept(frame)
        except JournalError:
            # The journal is full or failing. The frame counts as lost, and is fetched again when there is room.
            self._retry_at = time.monotonic() + RETRY_S
            return Verdict.GAP
        if verdict in {Verdict.BEGIN_AGAIN, Verdict.DROP_PARTS}:
            self._listener.fell_back(self._head())
        if verdict in {Verdict.FITS, Verdict.BEGIN_AGAIN}:
            self._listener.taken(frame)
        return verdict

    def _keep_ahead(self, frame: Frame) -> None:
        if frame.prev in self._ahead:
            return
        self._ahead[frame.prev] = frame
        self._ahead_bytes += frame.size
        while self._ahead_bytes > AHEAD_BYTES:
            oldest = next(iter(self._ahead))
            self._ahead_bytes -= self._ahead.pop(oldest).size

    def _drain_ahead(self) -> None:
        while self._ahead:
            position = self._head().position
            frame = self._ahead.pop(position, None)
            if frame is None:
                break
            self._ahead_bytes -= frame.size
            if self._take(frame) is not Verdict.FITS:
                break
        if self._replay is None:
            position = self._head().position
            for prev in [prev for prev in self._ahead if prev < position]:
                self._ahead_bytes -= self._ahead.pop(prev).size

    def _fill_if_behind(self) -> None:
        head = self._head()
        behind = self._known_head is not None and self._known_head > head.position
        if behind or self._ahead or self._others_are_further(head):
            self._fill()

    def _others_are_further(self, head: ChainHead) -> bool:
        """Return True when the origin is silent, and the heartbeats of the others say that its chain goes on."""
        if time.monotonic() - self._head_heard <= DOWN_AFTER_S:
            return False
        holding = self._members.holding(self.origin, head.incarnation)
        return any(chain.head > head.position for cid, chain in holding.items() if cid not in self._refused)

    def _candidates(self, head: ChainHead) -> list[int]:
        holding = self._members.holding(self.origin, head.incarnation)
        return [cid for cid in sources(self.origin, head.position, holding) if cid not in self._refused]

    def _fill(self) -> None:
        now = time.monotonic()
        if self._held or self._replay is not None or now < self._retry_at:
            return
        head = self._head()
        candidates = self._candidates(head)
        if not candidates:
            self._retry_at = now + RETRY_S
            holding = self._members.holding(self.origin, head.incarnation)
            if not forgotten_by_all(head.position, holding) or self._listener.begun_further_on(self.origin):
                return
            # While the origin is away it may still have what the others have forgotten.
            if self._members.up(self.origin):
                error = ResyncRequiredError(
                    f"no member can replay the chain of node {self.origin} from {head.position} any more"
                )
                self._listener.lost(self.origin, error)
            return
        server = candidates[0]
        request = self._new_id()
        message: Message = {
            "op": "replay",
            "id": request,
            "origin": self.origin,
            "incarnation": head.incarnation,
            "position": list(head.position),
            "credit": REPLAY_CREDIT,
        }
        if self._members.send(server, message):
            self._replay = _Replay(request, server, head.position, now)
            log.info("action=replay origin=%d server=%d position=%s", self.origin, server, head.position)
        else:
            self._retry_at = now + RETRY_S

    def _give_credit(self) -> None:
        replay = self._replay
        if replay is None or replay.owed < REPLAY_CREDIT // 4 or self._journals.pending_bytes > JOURNAL_BACKLOG:
            return
        if self._members.send(replay.server, {"op": "credit", "id": replay.request, "bytes": replay.owed}):
            replay.owed = 0

    def _abandon(self, reason: str) -> None:
        assert self._replay is not None
        log.warning("action=replay-abandoned origin=%d reason=%s", self.origin, reason)
        server = self._replay.server
        self._members.send(server, {"op": "cancel", "id": self._replay.request})
        self._replay = None
        self._avoid(server)

    def _avoid(self, server: int) -> bool:
        """Ask another member next. Return False when there is none: then the same one is asked again a little later."""
        now = time.monotonic()
        self._refused[server] = now + SILENCE_S
        if self._candidates(self._head()):
            return True
        del self._refused[server]
        self._retry_at = now + RETRY_S
        return False
