"""The voter: what this member has voted and promised, on disk before anybody hears of it.

The rules are `pmgsync.core.epochs` and `pmgsync.core.lease`; here they get a disk and a clock. The record belongs to
one cluster and one CID in it: what this node voted under another number, or elsewhere, binds nobody here. It is removed
with the cluster, after the document: a member that has a document has its record too.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from broker.cluster.state_directory import StateDirectory
from broker.net.keys import NodeKeys
from pmgsync.core.document import ClusterDocument
from pmgsync.core.epochs import Granted, Record, Refused, may_acknowledge, may_lead, may_take, may_vote
from pmgsync.core.lease import Lease, Promise, Request, is_kept
from pmgsync.core.signed import SignedDocument, accept_document
from pmgsync.core.votes import Ballot, Vote
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError

log = logging.getLogger(__name__)


class Voter:
    """What binds this member.

    Attributes:
        record: what is on disk.
        lease: this node's own, as master; `broker.leadership.lease` changes it.
        held: the document in force, None when no cluster is defined.
        holding: for each other member, the version of the document that its newest acknowledgement named.
        problem: why the record cannot be read or written, "" when it is well. One that cannot be read: this node
            votes for nobody, acknowledges nobody and does not lead, for it may have promised anything.
    """

    def __init__(self, state: StateDirectory, keys: NodeKeys, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.record = Record()
        self.lease = Lease(0, 0)
        self.holding: dict[int, tuple[int, int]] = {}
        self.problem = ""
        self._state = state
        self._keys = keys
        self._clock = clock
        self.held: SignedDocument | None = None
        self._cid = 0
        self._readable = True
        self._promise = Promise(0, -math.inf)

    # -- the document (`broker.cluster.documents.Judge`) --------------------------------------------------------------

    def follow(self, signed: SignedDocument | None, cid: int) -> None:
        """Take over that another document is in force, or none."""
        old = self.held
        if signed is None or not cid:
            self.held, self._cid = None, 0
            return
        new = signed.document
        if old is None or old.document.cluster != new.cluster or cid != self._cid:
            self.held, self._cid = signed, cid
            self._begin(new)
            return
        # What the database was told stays there, also when the lease is made anew.
        self._promise = self.binding
        self.held = signed
        if (new.epoch, new.master) != (old.document.epoch, old.document.master):
            self.lease, self.holding = Lease(new.epoch, cid), {}

    def _begin(self, document: ClusterDocument) -> None:
        self.lease, self.holding = Lease(document.epoch, self._cid), {}
        self._readable = True
        try:
            self.record = self._read()
            self.problem = ""
        except PmgsyncError as error:
            self._readable, self.record = False, Record()
            self.problem = f"{error}"
            log.error("action=votes-unreadable error=%s", error)
        # A record without a promise is of a member that has never acknowledged anybody.
        self._promise = Promise(0, -math.inf)
        if self.record.promised:
            self._promise = Promise.after_restart(self._clock(), document.lease_ms / 1000, self.record.promised)

    def may_take(self, offered: SignedDocument) -> bool:
        """Say whether an offered document is to be taken in the place of the one held.

        Raises:
            MembershipError: as `accept_document`.
        """
        assert self.held is not None
        if not self._readable:
            # It acknowledges nothing, so it may hold anything.
            return accept_document(self.held.document, offered)
        return may_take(self.held.document, self.record, offered)

    @property
    def may_lead(self) -> bool:
        """True when this node acts as master: asks for acknowledgements, opens its tables, changes the document."""
        if self.held is None or not self._readable:
            return False
        return may_lead(self._cid, self.held.document, self.record)

    @property
    def has_voted_away(self) -> bool:
        """True on a master that has voted in a later epoch: it opens nothing any more, fenced or not."""
        return self.held is not None and self._readable and not self.may_lead

    def refuse_change(self, new: ClusterDocument) -> None:
        """Refuse a change of who is a member while the one before could still be lost.

        Raises:
            MembershipError, recoverable: when a majority does not hold the document in force yet.
        """
        if self.held is None:
            return
        old = self.held.document
        if new.cluster != old.cluster or (new.cids, new.voters) == (old.cids, old.voters):
            return
        if not is_kept(old, self.holding):
            error = MembershipError(
                "the last change of the cluster is not on the disks of a majority of its members yet",
                hint="try again in a moment; `pmgcm status` says who does not answer",
            )
            error.recoverable = True
            raise error

    # -- what binds it ------------------------------------------------------------------------------------------------

    @property
    def promise(self) -> Promise:
        """What was promised to a master by acknowledging it."""
        return self._promise

    @property
    def binding(self) -> Promise:
        """What binds this member: its promise, or that it may write itself."""
        if self.held is None:
            return self._promise
        return self.lease.binding(self._promise, self.held.document, self._clock())

    def bound_s(self, cid: int) -> float:
        """Return for how many seconds more this member may neither acknowledge nor vote for a CID; 0.0 when it may."""
        return self.binding.binds_against(cid, self._clock())

    # -- what others ask ----------------------------------------------------------------------------------------------

    def acknowledge(self, master: int, epoch: int, request: Request) -> Granted | Refused:
        """Acknowledge a master's request, or say why not. The record is on disk when this returns."""
        if self.held is None or not self._readable:
            return self._unreadable()
        document = self.held.document
        if document.master == self._cid and epoch <= document.epoch:
            return Refused(f"CID {self._cid} is the master of epoch {document.epoch} itself", epoch=document.epoch)
        now = self._clock()
        answer = may_acknowledge(document, self.record, self.binding, epoch, master, now)
        if isinstance(answer, Refused):
            return answer
        if (failed := self._write(answer.record)) is not None:
            return failed
        self._promise = self._promise.given(master, request, now, document.lease_ms / 1000)
        return answer

    def release(self, master: int, request: Request) -> None:
        """Take over that a master has let go of everything up to a request."""
        self._promise = self._promise.released(master, request, self._clock())

    def vote(self, ballot: Ballot) -> Vote | Refused:
        """Vote, or say why not. The vote is on disk when this returns."""
        if self.held is None or not self._readable:
            return self._unreadable()
        answer = may_vote(self._cid, self.held, self.record, self.binding, ballot, self._clock())
        if isinstance(answer, Refused):
            return answer
        if (failed := self._write(answer.record)) is not None:
            return failed
        log.info("action=voted epoch=%d candidate=%d", ballot.epoch, ballot.candidate)
        return ballot.sign(self._cid, self._keys.sign_private)

    # -- the master ---------------------------------------------------------------------------------------------------

    def begin_asking(self) -> float:
        """Have a master promise itself to itself, on disk, before its first request.

        Returns:
            0.0 when it may ask, else the seconds that it has to wait: it may have promised itself to another.

        Raises:
            ConfigError: when the record cannot be written.
        """
        wait_s = self._promise.binds_against(self._cid, self._clock())
        if wait_s > 0:
            return wait_s
        if self.record.promised != self._cid:
            self._store(replace(self.record, promised=self._cid))
        if self._promise.master != self._cid:
            self._promise = Promise(self._cid, -math.inf)
        return 0.0

    def closed(self) -> None:
        """Take over that the database has confirmed that it is closed, of a node that is not the master (any more), or
        has let go: the promise to itself, above all the one that it must assume after a restart, is over.
        """
        if self._promise.master == self._cid:
            self._promise = replace(self._promise, until=-math.inf)

    # -- the disk -----------------------------------------------------------------------------------------------------

    def _unreadable(self) -> Refused:
        return Refused(f"CID {self._cid} cannot tell what it has voted and promised")

    def _write(self, record: Record) -> Refused | None:
        try:
            self._store(record)
        except PmgsyncError as error:
            return Refused(f"CID {self._cid} cannot write down what it promises ({error.message})")
        return None

    def _store(self, record: Record) -> None:
        if record == self.record:
            return
        assert self.held is not None
        content = {"cluster": self.held.document.cluster.hex(), "cid": self._cid, "record": record.to_map()}
        try:
            self._state.store_votes(json.dumps(content, sort_keys=True).encode())
        except PmgsyncError as error:
            self.problem = str(error)
            log.error("action=votes-not-written error=%s", error)
            raise
        self.record = record
        self.problem = ""

    def _read(self) -> Record:
        assert self.held is not None
        data = self._state.votes()
        if data is None:
            return Record()
        try:
            content = json.loads(data)
            if (content["cluster"], content["cid"]) != (self.held.document.cluster.hex(), self._cid):
                return Record()
            return Record.from_map(content["record"])
        except (ValueError, TypeError, KeyError, AttributeError, ProtocolError) as error:
            raise ProtocolError(
                f"{self._state.votes_path}, the record of this node's votes, is damaged ({type(error).__name__}), so "
                "it votes for nobody, acknowledges no master and is none",
                hint="delete this node on the master and join it anew; on a master promote another node first. In a "
                "cluster of one: remove the file and restart pmgsync-broker",
            ) from error
