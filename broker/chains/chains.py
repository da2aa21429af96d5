"""The chains of the cluster as this node holds them; they exist while the node is in one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Set
from pathlib import Path
from typing import Any

from broker.chains.follower import Follower
from broker.chains.publishing import Publishing
from broker.chains.streams import Streams
from broker.heartbeats.heartbeat import Applied, Heartbeat, HeldChain
from broker.heartbeats.lag import HeadClock
from broker.journal.journals import Journals
from broker.members.members import Members
from broker.net.loop import Loop
from pmgsync.core.chains import ChainHead
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from pmgsync.errors import JournalDamagedError, PmgsyncError, ProtocolError, ResyncRequiredError, UnknownChainError
from pmgsync.trace import hop

log = logging.getLogger(__name__)

WRITE_AFTER_S = 0.05
"""Seconds after which the journal's thread begins to write: by then the frame is on its way to whoever applies it, and
lone transactions that follow each other share one transaction of the journal and one fsync, on the disk that the
database writes its WAL to. Only the slot's confirmation, once a second, waits for the journal."""
WRITE_SOON_S = 0.002
"""The same while commits wait for it, in synchronous mode."""
MAX_DAMAGE = 10
"""Sentences about damage that status goes on showing."""


class Chains:
    """Journals of all chains, the own one and those that are followed, and the streams that are served from them.

    Attributes:
        applied: how far this node has applied each chain, by origin.
        clocks: where each chain's head was at which time, for the lag.
        damage: sentences about journals that could not be read.
    """

    def __init__(
        self,
        cid: int,
        cluster: bytes,
        directory: Path,
        loop: Loop,
        members: Members,
        *,
        publish: Callable[[bytes, bytes], None],
        durable: Callable[[Position, int], None],
        new_id: Callable[[], int],
        urgent: Callable[[], bool] = lambda: False,
        watches: bool = False,
    ) -> None:
        """Open the journals.

        Args:
            cid, cluster: this node's number, the cluster's 16 bytes.
            directory: of the journals.
            publish, durable: as in `Publishing`.
            new_id: returns a request id.
            urgent: says whether commits wait for the journal.
            watches: nobody applies anything here; the chains are followed for the others.

        Raises:
            JournalError: when the own chain's journal cannot be read.
        """
        self._cid = cid
        self._cluster = cluster
        self._loop = loop
        self._members = members
        self._new_id = new_id
        self._watches = watches
        self._held: set[int] = set()
        self._urgent = urgent
        self.journals = Journals(directory, cid, soon=self._soon)
        self.journals.start()
        self.streams = Streams(self.journals, self._damaged)
        self.own = Publishing(cid, cluster, self.journals, publish=publish, durable=durable, listener=self)
        self.applied: dict[int, Applied] = {}
        self.clocks: dict[int, HeadClock] = {}
        self.damage: list[str] = []
        self.acks_due = False
        self._followers = {origin: self._follower(origin) for origin in self.journals.chains() if origin != cid}
        self._lost: dict[int, ChainHead] = {}
        loop.add_descriptor(self.journals.notify_fd, self._journal_moved)

    def _soon(self, run: Callable[[], None]) -> None:
        self._loop.once(WRITE_SOON_S if self._urgent() else WRITE_AFTER_S, run)

    def close(self) -> None:
        """Write what was accepted to the journals and close them."""
        self._loop.remove(self.journals.notify_fd)
        self.journals.close()

    def _follower(self, origin: int) -> Follower:
        follower = Follower(origin, self.journals, self._members, self._new_id, self)
        if origin in self._held:
            follower.hold()
        return follower

    def hold(self, origin: int) -> None:
        """Take no more frames of a chain until `release`: this node fixes where it leaves it."""
        self._held.add(origin)
        if (follower := self._followers.get(origin)) is not None:
            follower.hold()

    def release(self) -> None:
        """Follow all chains again."""
        held, self._held = self._held, set()
        for origin in held:
            if (follower := self._followers.get(origin)) is not None:
                follower.release()

    def _journal_moved(self) -> None:
        self.journals.collect()
        self.own.journal_moved()

    # -- what is held -------------------------------------------------------------------------------------------------

    def heads(self) -> Mapping[int, ChainHead]:
        """Return the heads of all chains in the journals, by origin."""
        return self.journals.chains()

    def held(self) -> dict[int, HeldChain]:
        """Return what this node can replay, by origin."""
        return {
            origin: HeldChain(head.incarnation, self.journals.first(origin), head.position)
            for origin, head in self.heads().items()
        }

    def whole_since(self, origin: int, held: HeldChain) -> int:
        """Return the LSN after which nothing is missing of what a journal has, as far as that is known here.

        A journal that began with a copy begins beyond the frame before. That there is nothing between the two, the next
        frame says, for it follows that one, or the origin's heartbeat.
        """
        try:
            oldest = self.journals.read(origin, held.first, 1)
        except PmgsyncError:
            return held.first.lsn
        if oldest:
            prev = oldest[0].prev
            return min(held.first, prev).lsn if prev.complete else held.first.lsn
        told, own = self._members.holding(origin, held.incarnation).get(origin), self._members.own_chain(origin)
        idle = told is not None and own is not None and own.incarnation == held.incarnation
        if idle and told is not None and own is not None and told.head.complete and own.watermark >= held.first.lsn:
            return min(told.head, held.first).lsn
        return held.first.lsn

    def durable(self) -> dict[int, list[int]]:
        """Return incarnation, LSN and part up to which each chain is on disk here, by origin."""
        return {origin: [head.incarnation, *self.journals.durable(origin)] for origin, head in self.heads().items()}

    def follower(self, origin: int) -> Follower | None:
        """Return the follower of a foreign chain, None when nobody here has asked for it."""
        return self._followers.get(origin)

    # -- from capture -------------------------------------------------------------------------------------------------

    def open_own(self, incarnation: int, start: int, snapshot: bool) -> tuple[Position, int]:
        """Open the own chain for capture; see `Publishing.open`."""
        opened = self.own.open(incarnation, start, snapshot)
        self._note_head(self.heads()[self._cid])
        return opened

    # -- from the members ---------------------------------------------------------------------------------------------

    def live(self, origin: int, frame: Frame) -> None:
        """Take a frame that a member has published.

        Raises:
            ProtocolError: when it is not the member's own.
        """
        if frame.header.origin != origin or frame.header.cluster != self._cluster:
            raise ProtocolError(f"it published a frame of node {frame.header.origin}, or of another cluster")
        follower = self._followers.get(origin)
        hop("heard", frame.here.lsn)
        if follower is not None:
            follower.live(frame)
            hop("heard-done", frame.here.lsn)

    def damaged_frame(self, origin: int) -> None:
        """Count a frame of a member that did not match its checksum."""
        follower = self._followers.get(origin)
        if follower is not None:
            follower.count_damaged()

    def replayed(self, request: int, frames: Iterable[Frame]) -> None:
        """Take frames of a replay.

        Raises:
            ProtocolError: what reading a frame raises; those before it are taken.
        """
        with self.streams.gathered():
            for frame in frames:
                follower = self._followers.get(frame.header.origin)
                if follower is not None and frame.header.cluster == self._cluster:
                    follower.replayed(request, frame)

    def replay_ended(self, request: int) -> None:
        """A member has sent all it had."""
        for follower in list(self._followers.values()):
            follower.ended(request)

    def replay_failed(self, request: int, error: PmgsyncError) -> None:
        """A member has refused a replay or broken it off."""
        for follower in list(self._followers.values()):
            follower.failed(request, error)

    def connected(self) -> None:
        """Note that one more member can be asked."""
        for follower in self._followers.values():
            follower.try_again()

    def connection_lost(self, cid: int) -> None:
        """Note that a member will not answer what was asked of it."""
        for follower in self._followers.values():
            follower.server_gone(cid)

    def heard(self, heartbeat: Heartbeat) -> None:
        """Compare what a member says of its own chain with what is held of it."""
        origin, own = heartbeat.cid, heartbeat.own
        chain = heartbeat.chains.get(origin)
        if own is None or chain is None:
            return
        lsn = chain.head.lsn if chain.head.complete else chain.head.lsn - 1
        self.clocks.setdefault(origin, HeadClock()).note(heartbeat.received, own.incarnation, lsn)
        head, follower = self.heads().get(origin), self._followers.get(origin)
        if self._watches and (head is None or follower is None or head.incarnation != own.incarnation):
            # From now on: what is older is with those who apply it.
            self.follow(origin, own.incarnation, chain.head if chain.head.complete else Position(lsn))
            return
        if head is None or follower is None:
            return
        if head.incarnation == own.incarnation:
            follower.heard_head(chain.head)
        else:
            # Whoever applies the old chain must start anew.
            error = ResyncRequiredError(f"node {origin} has begun a new chain ({own.incarnation:016x})")
            self.streams.fail(origin, error)

    def forget(self, origin: int) -> None:
        """Drop all that is kept of a chain that is over."""
        self.streams.fail(origin, UnknownChainError(f"the chain of node {origin}, which was removed, is over here"))
        self._followers.pop(origin, None)
        self.journals.forget(origin)
        by_origin: list[MutableMapping[int, Any]] = [self.applied, self.clocks, self._lost]
        for known in by_origin:
            known.pop(origin, None)

    def forget_strangers(self, known: Set[int]) -> None:
        """Drop what was noted of nodes that were removed before anything of their chains was kept here."""
        for origin in [origin for origin in self.clocks if origin not in known]:
            del self.clocks[origin]

    # -- from apply ---------------------------------------------------------------------------------------------------

    def follow(self, origin: int, incarnation: int, position: Position) -> None:
        """Begin or continue to follow a foreign chain, so that this node gets everything after `position`."""
        head = self.heads().get(origin)
        fresh = head is None or head.incarnation != incarnation
        if fresh:
            fresh = self.journals.open(origin, incarnation, position).position == position
        if position < self.journals.first(origin):
            self.journals.reset(origin, incarnation, position)
            fresh = True
        follower = self._followers.get(origin)
        if follower is None:
            follower = self._followers[origin] = self._follower(origin)
        elif fresh:
            follower.reset()
        follower.tick()

    def applied_moved(self, origin: int, applied: Applied) -> None:
        """Note how far this node's database has applied a chain."""
        self.applied[origin] = applied
        self.acks_due = True

    # -- what followers and the own chain tell (`Listener`) -----------------------------------------------------------

    def taken(self, frame: Frame) -> None:
        """A frame was taken into the journal."""
        self.streams.offer(frame)
        self._note_head(self.heads()[frame.header.origin])

    def fell_back(self, head: ChainHead) -> None:
        """The parts of a half transaction were dropped."""
        self.streams.fall_back(head.origin, head.complete)

    def begun_further_on(self, origin: int) -> bool:
        """Begin the journal where apply stands when that is beyond its head, and return True.

        A killed broker's journal may lack the last frames that it handed to apply. They were acknowledged, so that the
        others may have forgotten them.
        """
        head = self.heads()[origin]
        applied = self.applied.get(origin)
        if not applied or applied.incarnation != head.incarnation or applied.position <= head.complete:
            return False
        self.journals.reset(origin, head.incarnation, applied.position)
        self._followers[origin].reset()
        return True

    def lost(self, origin: int, error: PmgsyncError) -> None:
        """Deal with a gap that nobody can fill: begin behind it when apply has passed it, else ask for a snapshot.

        Where nobody applies, the journal begins again with the oldest that a member has.
        """
        if self._watches:
            incarnation = self.heads()[origin].incarnation
            firsts = [chain.first for chain in self._members.holding(origin, incarnation).values()]
            if firsts:
                self.journals.reset(origin, incarnation, min(firsts))
                self._followers[origin].reset()
            return
        if self.begun_further_on(origin):
            return
        head = self.heads()[origin]
        if self._lost.get(origin) != head:
            # Detected again and again until somebody has resynchronised, which may take long.
            self._lost[origin] = head
            log.error("action=resync-required origin=%d position=%s", origin, head.position)
        self.streams.fail(origin, error)

    def _damaged(self, origin: int, position: Position, error: JournalDamagedError) -> None:
        """Forget what cannot be read: other members may have it, or a snapshot replaces it."""
        first = self.journals.pass_damage(origin, position)
        log.error("action=journal-damaged origin=%d position=%s first=%s error=%s", origin, position, first, error)
        self.damage = [*self.damage[-MAX_DAMAGE + 1 :], error.message]

    def _note_head(self, head: ChainHead) -> None:
        clock = self.clocks.get(head.origin)
        if clock is None:
            clock = self.clocks[head.origin] = HeadClock()
        clock.note(time.monotonic(), head.incarnation, head.complete.lsn)

    # -- time ---------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Check the time-outs of the own chain, of streams and of replays."""
        self.own.tick()
        self.streams.expire()
        for follower in self._followers.values():
            follower.tick()
