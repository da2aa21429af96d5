"""This node's part in a cluster: everything that is made when it enters one and dropped when it leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from broker.chains.acks import Acks
from broker.chains.chains import Chains
from broker.chains.departed import Departed
from broker.chains.synchronous import SynchronousCommits
from broker.chains.trimming import Trimming
from broker.cluster.door import Door
from broker.cluster.identity import check_identity
from broker.cluster.joiners import Joiners
from broker.cluster.joins import Joins
from broker.cluster.rekeying import Rekeying
from broker.inbound import Inbound
from broker.journal.retention import Limits
from broker.leadership.asking import Asking
from broker.leadership.leadership import Around, Leadership
from broker.members.calls import Calls, End
from broker.members.members import Members
from broker.net.loop import Loop
from broker.requests.control import ControlRequests
from broker.requests.keys import KeyRequests
from broker.requests.served_ports import ServedPorts
from broker.requests.sessions import Session
from broker.requests.shared import SharedRequests
from broker.requests.voting import VotingRequests
from broker.requests.workers import (
    WorkerRequests,
    tell_announcement,
    tell_apply,
    tell_durable,
    tell_lease,
    tell_synchronous,
)
from broker.resources import Resources
from broker.status.health import Health
from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError

log = logging.getLogger(__name__)

HEAR_MEMBERS_S = 1.5
"""For so long after its start a master waits for the members' heartbeats before its chain is opened."""
ASKED_AGAIN_S = 0.05


# Over 250 lines: it makes and wires what exists only in a cluster; most of it is one constructor.
class Participation:
    """Members, chains, and whoever serves them.

    Attributes:
        cid: this node's number.
        workers: serves the agent's workers.
        leading: what this node does as master, or to become it.
        synchronous: what the master's commits wait for.
        departed: knows the chains of nodes that were removed.
        keys: serves changes of this node's keys, and of members' on the master.
        health: judges this node.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        offer_document: Callable[[int, bytes], None],
        change_document: Callable[[ClusterDocument, Callable[[SignedDocument], None]], SignedDocument],
        begin_epoch: Callable[[ClusterDocument], object],
        departed_changed: Callable[[], None],
    ) -> None:
        """Open the journals; `follow_document` then opens ports and connections.

        Args:
            offer_document: takes the CID of a member and the packed document that it offers; raises PmgsyncError when
                it is not acceptable.
            change_document: signs and stores a new document, tells of it, and puts it in force.
            begin_epoch: likewise the first document of an epoch of this node.
            departed_changed: is called when other chains of nodes that were removed are not over here.

        Raises:
            ConfigError: when this is not the node that the document means.
            JournalError: when the own journal cannot be read.
        """
        config, documents, sessions = resources.config, resources.documents, resources.sessions
        document, self.cid = documents.document, documents.cid
        check_identity(config, document, self.cid)
        self._documents = documents
        self._ports = resources.ports
        self._calls = Calls(resources.new_id)
        self._change_document = change_document
        self._since = time.monotonic()
        self._is_closed = False
        self._members = Members(resources.context, resources.loop, resources.keys, self.cid)
        self._rekeying = Rekeying(
            resources.state,
            resources.keys,
            resources.context,
            resources.loop,
            self._members,
            signed=lambda: self._signed,
            offer_document=offer_document,
        )
        self.keys = KeyRequests(
            self.cid,
            resources.keys,
            documents,
            self._rekeying,
            self._members,
            ask=Asking(self._members, self._calls, resources.new_id).ask,
            change_document=change_document,
            offer_document=offer_document,
        )
        self._chains = Chains(
            self.cid,
            document.cluster,
            config.state_dir / "journal",
            resources.loop,
            self._members,
            publish=lambda header, body: self.publish(b"f", header, body),
            durable=partial(tell_durable, sessions),
            new_id=resources.new_id,
            urgent=lambda: documents.document.synchronous,
            watches=document.is_witness(self.cid),
        )
        limits = Limits(config.journal.max_bytes, config.journal.max_age_s)
        divergence = DivergenceFiles(config.state_dir)
        self._trimming = Trimming(self.cid, self._chains, self._members, limits, divergence)
        self.departed = Departed(
            self.cid,
            self._chains,
            self._members,
            divergence,
            document=lambda: self._signed.document,
            tell=partial(tell_apply, sessions),
            changed=departed_changed,
        )
        self._shared = SharedRequests(
            self.cid,
            config.name,
            self._chains,
            self._members,
            self._calls,
            sessions,
            document=documents.packed,
        )
        self.leading = Leadership(
            self.cid,
            resources.voter,
            self._members,
            self._chains,
            divergence,
            Around(
                document=lambda: self._signed,
                change_document=self.change_document,
                begin_epoch=begin_epoch,
                offer_document=offer_document,
                ask=Asking(self._members, self._calls, resources.new_id).ask,
                tell_agent=partial(tell_lease, sessions),
                ask_agent=self._shared.ask_agent,
                trees=lambda: [tree for session in sessions.workers() for tree in session.trees],
            ),
        )
        self.synchronous = SynchronousCommits(
            self.cid,
            self._members,
            self._chains,
            document=lambda: documents.document,
            leads=lambda: resources.voter.may_lead and not resources.voter.lease.closing,
            change_document=self.change_document,
            tell=partial(tell_synchronous, sessions),
        )
        self._members.on_acknowledged = self.synchronous.acknowledged
        self._acks = Acks(
            self.cid,
            self._chains,
            self._members,
            document=lambda: documents.document,
            voted_epoch=lambda: resources.voter.record.epoch,
        )
        self.workers = WorkerRequests(
            self.cid,
            self._chains,
            self._members,
            self._calls,
            sessions,
            self._shared,
            announce=lambda data: self.publish(b"t", data),
            lease_told=self.leading.agent_told,
            later=partial(self._later, resources.loop),
            knows_epoch=self._knows_epoch,
            chain_done=self.departed.done,
            synchronous=self.synchronous,
            applied=self._acks.applied,
        )
        self._joiners = Joiners(time.monotonic)
        self._joins = Joins(
            self.cid,
            self._joiners,
            documents,
            resources.tokens,
            self._members,
            change_document=self.change_document,
            new_id=resources.new_id,
        )
        control = ControlRequests(
            self.cid,
            self._ports.control,
            self._shared,
            self._members,
            self._joiners,
            VotingRequests(
                resources.voter,
                self.leading.handover,
                offer_document=offer_document,
                document=lambda: self._signed,
                refused=self._members.refuse,
            ),
            self.keys,
            document=documents.packed,
            confirm=self._joins.confirm,
            give_up=self._joins.give_up,
        )
        door = Door(
            self._ports.join,
            resources.loop,
            resources.tokens,
            resources.attempts,
            resources.passwords,
            resources.refusals,
            self,
        )
        self._served = ServedPorts(
            self._ports, resources.loop, resources.keys, control=control, door=door, beat=self.beat
        )
        self._inbound = Inbound(
            self._members,
            self._chains,
            self._calls,
            document=lambda: documents.document,
            offer_document=offer_document,
            new_id=resources.new_id,
            announced=partial(tell_announcement, sessions),
            splits=resources.splits,
        )
        self.health = Health(
            self.cid,
            config,
            self._members,
            self._chains,
            self._trimming,
            self.departed,
            sessions,
            document=lambda: documents.document,
            joining=self._joiners.progress,
            conf_problem=lambda: resources.conf_file.problem,
            voting_problem=lambda: resources.voter.problem,
            split_problem=resources.splits.problem,
            lease=self.leading.lease.status,
            synchronous=self.synchronous,
            refusals=resources.refusals.recent,
        )

    @property
    def _signed(self) -> SignedDocument:
        signed = self._documents.signed
        assert signed is not None
        return signed

    # -- the document -------------------------------------------------------------------------------------------------

    def follow_document(self, *, cut: bool, renewed: bool) -> None:
        """Bring ports and connections in line with the document in force.

        Args:
            cut: a key is nobody's any more, and its connections must end.
            renewed: this node has other keys now.

        Raises:
            ConfigError: when a port cannot be bound.
        """
        if renewed:
            self._rekeying.renewed()
            self.keys.renewed()
            self._members.renew(self._inbound)
        if cut or renewed:
            self._served.cut(renewed=renewed)
        self.open_ports()
        self.publish(b"d", self._signed.pack())
        self._members.meet(self._signed.document, self._inbound)
        self._joiners.expect(self._signed.document.joining)
        self.departed.follow_document()
        self.beat()

    def lives(self) -> dict[int, set[int]]:
        """Return the incarnations of each chain that are known here, in the journal or applied, by origin."""
        found = {origin: {head.incarnation} for origin, head in self._chains.heads().items()}
        for origin, applied in self._chains.applied.items():
            found.setdefault(origin, set()).add(applied.incarnation)
        return found

    def announce(self, signed: SignedDocument) -> None:
        """Publish a document that is about to come in force, while those whose connections it ends still hear it."""
        self.publish(b"d", signed.pack())

    def answer_offer(self, cid: int) -> None:
        """Offer a member the document in force, for it has offered one that this one replaces."""
        self._members.send(cid, {"op": "offer"}, (self._signed.pack(),))

    def open_ports(self) -> None:
        """Bind what is not bound.

        Raises:
            ConfigError: when a port cannot be bound.
        """
        self._served.open(is_master=self._is_master)

    @property
    def _is_master(self) -> bool:
        return self._signed.document.master == self.cid

    def _knows_epoch(self) -> bool:
        """Return False on a master that has just begun, until the members have been heard, or are taken to be away.

        One that was replaced while it was away must know that before it publishes.
        """
        if not self._is_master or time.monotonic() - self._since >= HEAR_MEMBERS_S:
            return True
        epoch = self._signed.document.epoch
        links = [link for link in self._members if link.member.votes]
        return all(link.heartbeat is not None and link.heartbeat.epoch <= epoch for link in links)

    def _later(self, loop: Loop, run: Callable[[], None]) -> None:
        loop.once(ASKED_AGAIN_S, lambda: None if self._is_closed else run())

    def close(self) -> None:
        """Leave: end all connections and write what was accepted to the journals."""
        self._is_closed = True
        self.leading.promotion.close()
        self._rekeying.close()
        self._members.close()
        self._served.close()
        self._chains.close()

    # -- what the door needs ------------------------------------------------------------------------------------------

    def master_document(self) -> ClusterDocument:
        """Return the cluster document, on the master only; raises MembershipError on any other node."""
        return self._documents.master_document()

    def ask_facts(self, caller: End) -> None:
        """Have the agent tell what this node's database is like; raises UnreachableError when there is no agent."""
        self._shared.ask_agent(caller, "facts")

    def when_kept(self, done: Callable[[PmgsyncError | None], None]) -> None:
        """Call `done` when no vote can lose the document in force any more."""
        self.leading.lease.when_kept(done)

    def change_document(self, document: ClusterDocument) -> SignedDocument:
        """Sign, store and spread a new cluster document."""
        return self._change_document(document, lambda signed: None)

    # -- this machine's processes -------------------------------------------------------------------------------------

    def session_over(self, session: Session) -> None:
        """End what a session had open."""
        self.keys.session_over(session)
        self._shared.close_streams(session.identity)
        self._calls.drop_owner(session.identity, UnreachableError(f"the {session.worker} worker went away"))

    # -- time ---------------------------------------------------------------------------------------------------------

    def publish(self, *parts: bytes) -> None:
        """Publish an event."""
        self._ports.events.publish(parts)

    def beat(self) -> None:
        """Publish a heartbeat."""
        self.publish(b"h", self.health.heartbeat().pack())

    def send_acks(self) -> None:
        """Tell the members how far chains are applied and on disk here, when that has changed."""
        self._acks.send()

    def tick(self) -> None:
        """Check all time-outs."""
        self._chains.tick()
        self._members.tick()
        self._rekeying.tick()
        document = self._signed.document
        witnesses = frozenset(cid for cid in document.cids if document.is_witness(cid))
        self._trimming.tick(document.databases, document.joining - witnesses)
        self.departed.tick()
        self._joins.tick()
