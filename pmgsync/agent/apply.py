"""The apply worker of one origin: takes its frames from the local broker and commits them in the local database."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import pairwise

from pmgsync.agent.apply_thread import ApplyThread
from pmgsync.agent.departing import ChainOverError, end_chain
from pmgsync.agent.export import Export, held_of
from pmgsync.agent.named_files import AwaitedFiles
from pmgsync.agent.resync import Resync
from pmgsync.agent.worker import REPORT_S, SessionOverError, Worker
from pmgsync.config import NodeConfig
from pmgsync.core.document import Epoch
from pmgsync.core.forks import forks_before
from pmgsync.core.frames import read_frames
from pmgsync.core.positions import Position
from pmgsync.core.profile import Policy
from pmgsync.core.stretches import Stretch
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, ResyncRequiredError, UnreachableError
from pmgsync.postgres.apply import Applier
from pmgsync.postgres.apply.stale import StaleTables
from pmgsync.postgres.setup.departing import OVER
from pmgsync.postgres.setup.returning import fetch_from_master, mirrored_tables, pass_chain, positions
from pmgsync.profile_file import load_profile
from pmgsync.trace import hop
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

CREDIT_BYTES = 8 << 20
"""Bytes of frames that may wait here to be applied."""
CREDIT_STEP = CREDIT_BYTES // 8
"""Credit is given back when it comes to so much: a lone transaction needs no message for it."""
SHORT_BYTES = 1 << 20
"""A stretch that does not count any more of at most so many bytes of WAL is looked at here."""
ALERT_COUNT = 20


class ApplyWorker(Worker):
    """Keeps this node's database in step with one origin."""

    def __init__(self, config: NodeConfig, origin: int) -> None:
        super().__init__(config, f"apply:{origin}")
        self.origin = origin
        self._profile = load_profile(config.profile)
        self._stale = StaleTables(origin)
        self._divergence = DivergenceFiles(config.state_dir)
        self._files = AwaitedFiles(config, self._profile, origin, lambda: self.document)

    def _history(self) -> Sequence[Epoch]:
        return self.document.history

    def _holds(self) -> str:
        """Return what has to be worked off here before changes that a later master made may be applied.

        A stretch has the epoch of the document with which this node learned of it. It may have ceased to count in an
        earlier one, so those of every epoch wait.
        """
        pending = [one for one in self._divergence.pending() if one.epoch <= self.document.epoch]
        return f"{len(pending)} stretches of chains that do not count any more are exported first" if pending else ""

    def _end_stretches(self, link: BrokerLink, known: tuple[int, Position] | None) -> None:
        """Tell where the stretches of this chain end here that do not count any more: nothing after it is applied."""
        incarnation, position = known if known is not None else (0, Position(0))
        for stretch in self._divergence.pending():
            if stretch.origin != self.origin or stretch.upto is not None or stretch.epoch > self.document.epoch:
                continue
            ended = self._exported(link, stretch.ended(position.lsn if stretch.incarnation == incarnation else 0))
            # What was left out of a table of this chain, or fetched with more than counts, is to be fetched from the
            # master of now: this chain's origin does not answer for it any more.
            tables = tuple(
                key
                for key, table in self._stale.tables.items()
                if self._mirrors(*key) and (table.kind != "none" or table.until > stretch.after)
            )
            tables = tuple(dict.fromkeys((*ended.tables, *tables)))
            if (ended.empty or (ended.exported and not ended.lost)) and not tables:
                self._divergence.done(stretch)
            else:
                self._divergence.keep(replace(ended, tables=tables))

    def _exported(self, link: BrokerLink, stretch: Stretch) -> Stretch:
        """Export a short stretch that the journal has, and return it so; else as it was, for the divergence worker.

        After a switchover there is mostly nothing in it that only the master may write, and what the new master writes
        waits for that to be known: starting the worker takes longer.
        """
        upto = stretch.upto
        if upto is None or stretch.empty or stretch.gained or upto - stretch.after > SHORT_BYTES:
            return stretch
        held = held_of(link, stretch.origin)
        if held.incarnation != stretch.incarnation or held.since > stretch.after or held.whole < upto:
            return stretch
        export = Export(link, self._divergence, self._profile, self.document, other=self.handle)
        tables, lost = export.run(stretch, held)
        return replace(stretch, exported=True, tables=tuple(tables), lost=lost)

    def _pass_those_gone(self) -> None:
        """Have everything of the master's fetched when a master before it is gone, and its chain not wholly applied
        here: the rest comes no more.
        """
        document = self.document
        if self.origin != document.master:
            return
        forks = forks_before(document.history)
        for before, entry in pairwise(document.history):
            fork = entry.fork
            if fork is None or before.master == self.cid or before.master in document.cids | self.departed:
                continue
            incarnation, lsn = positions(self.config.dsn).get(before.master, (0, 0))
            if incarnation == fork.incarnation and lsn < fork.lsn:
                reason = f"node {before.master}, the master before, is gone, and not all that it wrote came here"
                tables = mirrored_tables(self.config.dsn, self._profile)
                fetch_from_master(self.config.dsn, document.master, tables, forks=forks, reason=reason)
                pass_chain(self.config.dsn, before.master, fork.lsn)

    def _fetch_mirrors(self) -> None:
        """Have everything of the master's fetched from it, when a chain is copied whole that a master before it wrote:
        the copy has only the rows that its origin answers for now.
        """
        document = self.document
        if document.master in {self.origin, self.cid} or self.origin not in {one.master for one in document.history}:
            return
        incarnation, lsn = positions(self.config.dsn).get(self.origin, (0, 0))
        forks = [
            entry.fork for before, entry in pairwise(document.history) if before.master == self.origin and entry.fork
        ]
        if all(fork.incarnation == incarnation and lsn >= fork.lsn for fork in forks):
            return
        reason = f"not all that node {self.origin}, a master before, wrote came here"
        tables = mirrored_tables(self.config.dsn, self._profile)
        others = {cid: fork for cid, fork in forks_before(document.history).items() if cid != self.origin}
        fetch_from_master(self.config.dsn, document.master, tables, forks=others, reason=reason)

    def _mirrors(self, schema: bytes, name: bytes) -> bool:
        rule = self._profile.rule_for(*(part.decode(errors="surrogateescape") for part in (schema, name)))
        return rule is not None and rule.policy is Policy.MIRROR

    def _urgent(self) -> bool:
        return self.document.synchronous and self.document.master == self.origin

    def _members(self) -> Collection[int]:
        return self.document.cids

    def _chains(self) -> Collection[int]:
        return self.document.cids | self.departed

    @property
    def _gone(self) -> bool:
        """True when the origin was removed from the cluster."""
        return self.origin not in self.document.cids

    def session(self, link: BrokerLink) -> None:
        """Apply from the database's position on until something ends it."""
        try:
            self._follow(link)
        except ChainOverError as over:
            document, origin = self.document, self.origin
            end_chain(self.config, self._profile, document, origin=origin, own_cid=self.cid, lost=over.lost)
            self._await_end(link)

    def _await_end(self, link: BrokerLink) -> None:
        """Tell the broker that the chain is forgotten here; it has this process ended."""
        self.state, self.alerts = "A", []
        done = {"op": "chain.done", "origin": self.origin}
        link.send(done)
        while self._gone:
            self.recovered()
            self.report()
            received = link.receive(REPORT_S)
            if received is not None and received[0]["op"] == "chain.over":
                link.send(done)
            elif received is not None:
                self.handle(*received)

    def handle(self, message: Message, attachments: Sequence[bytes]) -> None:
        """Handle a message beside the work; raises ChainOverError when the chain is to be forgotten."""
        if message["op"] == "chain.over" and self._gone:
            raise ChainOverError(lost=message.get("lost") is True)
        super().handle(message, attachments)

    def _begins(self, link: BrokerLink, known: tuple[int, Position] | None) -> tuple[int, Position]:
        """Return from where on the chain is applied, incarnation 0 when the broker is to tell.

        Raises:
            ChainOverError: when it is over here.
            ResyncRequiredError: when it was over here, and its node is a member again.
        """
        if known is not None and known[0] == OVER:
            if self._gone:
                raise ChainOverError(lost=False)
            raise ResyncRequiredError(f"node {self.origin} was removed, and is a member again")
        if known is None and self._gone and self.cid != self.document.master:
            # What came before the part that the others still have is with the master only.
            place = {"incarnation": OVER, "position": list(Position(0))}
            link.send({"op": "applied", "origin": self.origin, **place})
            while True:
                self.report()
                received = link.receive(REPORT_S)
                if received is not None:
                    self.handle(*received)
        return known if known is not None else (0, Position(0))

    def _follow(self, link: BrokerLink) -> None:
        self._pass_those_gone()
        self._files.begin()
        applier = Applier(
            self.config.dsn,
            self._profile,
            origin=self.origin,
            own_cid=self.cid,
            history=self._history,
            members=self._members,
            followed=self._chains,
            stale=self._stale,
            waits=self.config.synchronous_commit,
            elsewhere=lambda: self.split.get(self.origin, 0),
            holds=self._holds,
            files=self._files,
        )
        try:
            known = applier.connect()
            self._end_stretches(link, known)
            try:
                incarnation, position = self._begins(link, known)
                opened, _ = link.request(
                    {
                        "op": "apply.open",
                        "origin": self.origin,
                        "incarnation": incarnation,
                        "position": list(position),
                        "credit": CREDIT_BYTES,
                        "partial": bool(self._stale.waiting()),
                    }
                )
            except ResyncRequiredError as error:
                applier.close()
                self._resynchronise(error)
                return
            if known is None:
                incarnation, position = int(opened["incarnation"]), Position.parse(opened["position"])
                applier.begin_chain(incarnation, position)
        except (PmgsyncError, ChainOverError):
            applier.close()
            raise
        log.info("action=apply origin=%d incarnation=%016x position=%s", self.origin, incarnation, position)
        self.state = "A"
        thread = ApplyThread(applier, self.wakeup, self._urgent)
        counted = Counter(self.counters)
        try:
            self._stream(
                link, thread, int(opened["id"]), incarnation, lambda: self._describe(applier, counted, thread.awaits)
            )
        except ResyncRequiredError as error:
            thread.stop()
            self._resynchronise(error)
        finally:
            thread.stop()
            self._describe(applier, counted, "")
            with contextlib.suppress(UnreachableError):  # a broker that is gone has no stream to close
                link.send({"op": "cancel", "id": int(opened["id"])})

    def _stream(
        self, link: BrokerLink, thread: ApplyThread, stream: int, incarnation: int, describe: Callable[[], None]
    ) -> None:
        waiter = Waiter(link, wakeup=self.wakeup)
        used = 0
        while True:
            waiter.wait(REPORT_S)
            for received in link.pending():
                self._take(thread, stream, *received)
            newest = None
            while (applied := thread.next_result()) is not None:
                newest, used = applied, used + applied.size
            if newest is not None:
                self.recovered()
                place = {"position": list(newest.durable), "visible": list(newest.visible), "partial": newest.partial}
                link.send({"op": "applied", "origin": self.origin, "incarnation": incarnation, **place})
                if used >= CREDIT_STEP:
                    link.send({"op": "credit", "id": stream, "bytes": used})
                    used = 0
            elif thread.idle:
                # An error is over when something was applied, or there is nothing to apply; not because time passes.
                self.recovered()
            self.state = "S" if thread.awaits else "A"
            if self.report_due:
                describe()
                self.report()

    def _describe(self, applier: Applier, counted: Counter[str], awaits: str) -> None:
        """Set what the next report says; `counted` is what sessions before this one have counted."""
        warnings = list(applier.stats.warnings)[-ALERT_COUNT:]
        self.alerts = [{"kind": "table", "text": warning} for warning in warnings]
        self.alerts += self._stale.alerts()[:ALERT_COUNT]
        self.alerts += [{"kind": "schema", "text": text} for text in applier.failures]
        self.alerts += [{"kind": "files", "text": text} for text in self._files.alerts()]
        self.alerts += [{"kind": "epoch", "text": awaits}] if awaits else []
        self.counters = counted + Counter(dict(applier.stats.lost))

    def _take(self, thread: ApplyThread, stream: int, message: Message, attachments: Sequence[bytes]) -> None:
        if message["op"] == "frame" and message.get("id") == stream:
            for frame in read_frames(attachments):
                hop("received", frame.here.lsn)
                thread.submit(frame)
        elif message["op"] != "frame":
            self.handle(message, attachments)

    def _resynchronise(self, reason: ResyncRequiredError) -> None:
        if self._gone:
            # Nobody can be asked for a copy. What can still be had of the chain comes from the members' journals.
            if reason.tables:
                self._stale.unreachable(reason.tables)
                return
            raise UnreachableError(f"node {self.origin} was removed and cannot be asked: {reason.message}")
        log.warning("action=resync origin=%d tables=%s reason=%s", self.origin, list(reason.tables), reason)
        self.state = "S"
        self.alerts = [{"kind": "resync", "text": f"resynchronising from node {self.origin}: {reason.message}"}]
        assert self.link is not None
        if not reason.tables:
            self._fetch_mirrors()
        resync = Resync(
            self.config,
            self._profile,
            origin=self.origin,
            own_cid=self.cid,
            document=self.document,
            tables=reason.tables,
            wakeup=self.wakeup,
        )
        waiter = Waiter(self.link, wakeup=self.wakeup)
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
