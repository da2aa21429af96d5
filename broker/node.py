"""The broker of one node: its timers, and the wiring of what it has with and without a cluster."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import zmq

from broker.cluster.attempts import Attempts
from broker.cluster.conf_file import ConfFile
from broker.cluster.documents import Documents
from broker.cluster.identity import own_member
from broker.cluster.password import PamPassword
from broker.cluster.state_directory import StateDirectory
from broker.cluster.tokens import Tokens
from broker.leadership.left_behind import note_left_behind
from broker.leadership.splits import Splits
from broker.leadership.voter import Voter
from broker.members.calls import Send
from broker.net.local_port import LocalPort
from broker.net.loop import Loop, Socket
from broker.net.refusals import Refusals
from broker.net.zap import ZapHandler
from broker.participation import Participation
from broker.requests.admin import AdminRequests
from broker.requests.local import LocalRequests
from broker.requests.sessions import CLIENTS, Session, Sessions
from broker.requests.workers import WorkerRequests
from broker.resources import Resources, node_ports
from pmgsync.config import NodeConfig
from pmgsync.core.membership import ClusterDocument, SignedDocument, cuts_off, no_cluster, was_removed
from pmgsync.core.synchronous import Setting
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, SplitBrainError
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
ACK_S = 0.05
TICK_S = 0.25
LEASE_S = 0.1
HURRY_S = 0.02
"""While a master hands over nobody can write its tables."""
RETRY_S = 1.0
"""Seconds between two attempts to put a document in force that could not be."""
BIND_S = 0.05


class Broker:
    """One node's broker; `run` serves until `stop`."""

    def __init__(self, config: NodeConfig) -> None:
        """Take the state directory and the local socket.

        Raises:
            ConfigError: when one of them cannot be used, or another process has it.
        """
        self.config = config
        self._state = StateDirectory(config.state_dir)
        self._hold = self._state.hold()
        keys = self._state.keys()
        self._loop = Loop()
        self._context: zmq.Context[Socket] = zmq.Context()
        self._voter = Voter(self._state, keys)
        self._divergence = DivergenceFiles(config.state_dir)
        self._documents = Documents(self._state, keys, self._voter, leave=self._leave_behind)
        self._splits = Splits(self._held_document, self._spread_split)
        refusals = Refusals(time.monotonic)
        self._zap = ZapHandler(
            self._context, self._loop, self._documents.cid_of_key, refusals, self._documents.was_removed
        )
        port = LocalPort(self._loop, config.broker_socket)
        tokens = Tokens(time.monotonic, self._state)
        self._sessions = Sessions(port, self._session_over)
        self._passwords = PamPassword(self._loop, config.pam_service)
        self._resources = Resources(
            config=config,
            state=self._state,
            keys=keys,
            context=self._context,
            loop=self._loop,
            ports=node_ports(self._context, self._loop, config, refusals),
            refusals=refusals,
            sessions=self._sessions,
            tokens=tokens,
            attempts=Attempts(time.monotonic),
            passwords=self._passwords,
            documents=self._documents,
            voter=self._voter,
            splits=self._splits,
            conf_file=ConfFile(config),
            new_id=itertools.count(1).__next__,
        )
        self._participation: Participation | None = None
        self._failed = self._hurries = False
        self._local = LocalRequests(
            port,
            self._sessions,
            admin=AdminRequests(self, tokens),
            workers=self._workers,
            membership=self._membership,
            splits=self._splits.sides,
            departed=self._departed,
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` is called.

        Raises:
            PmgsyncError: when the document that is on disk cannot be put in force.
        """
        try:
            self._put_in_force(self._state.document())
            for interval_s, work in (
                (HEARTBEAT_S, self._beat),
                (ACK_S, self._send_acks),
                (TICK_S, self._tick),
                (LEASE_S, self._keep_lease),
                (RETRY_S, self._retry),
                (BIND_S, self._bind_rest),
            ):
                self._loop.every(interval_s, work)
            self._loop.run()
        finally:
            self.close()

    def stop(self) -> None:
        """End `run` soon."""
        self._loop.stop()

    def close(self) -> None:
        """Close everything; what is accepted is written to the journal first."""
        self._leave()
        self._local.close()
        self._passwords.close()
        self._zap.close()
        self._context.destroy(linger=0)
        self._hold.close()

    # -- the cluster document -----------------------------------------------------------------------------------------

    def _put_in_force(self, signed: SignedDocument | None) -> None:
        """Put a document in force.

        Raises:
            PmgsyncError: when it cannot be; the node is in no cluster then, and tries again.
        """
        try:
            self._follow(signed)
        except PmgsyncError:
            self._leave_for_now()
            raise
        self._failed = False

    def _follow(self, signed: SignedDocument | None) -> None:
        documents, part = self._documents, self._participation
        before = documents.signed.document if documents.signed is not None and part is not None else None
        cut = before is not None and signed is not None and cuts_off(before, signed.document)
        if part is not None and signed is not None and documents.signed is not None:
            if signed.body == documents.signed.body:
                return
            if cut:
                part.announce(signed)
        keys = self._resources.keys.current
        documents.put_in_force(signed)
        cid = documents.cid
        if part is not None and (cid != part.cid or (before and signed and before.cluster != signed.document.cluster)):
            log.warning("action=left-cluster cid=%d", part.cid)
            self._leave()
            part = None
        if signed is not None and cid:
            log.info("action=document cid=%d epoch=%d serial=%d", cid, *signed.document.version)
            self._resources.conf_file.follow(signed.document)
            if part is None:
                cut, keys = False, self._resources.keys.current
                part = self._participation = Participation(
                    self._resources,
                    offer_document=self._offer_document,
                    change_document=self._change_document,
                    begin_epoch=self._begin_epoch,
                    departed_changed=self._local.spread_document,
                )
            part.follow_document(cut=cut, renewed=self._resources.keys.current is not keys)
        self._splits.follow_document()
        self._local.spread_document()
        if part is not None and self._participation is part:
            part.leading.follow_document()
            part.synchronous.tick()

    def _change_document(self, document: ClusterDocument, told: Callable[[SignedDocument], None]) -> SignedDocument:
        """Sign, store and spread a new cluster document; `told` gets it before it is in force.

        Raises:
            PmgsyncError: when it cannot be stored or put in force.
        """
        signed = self._documents.change(document)
        told(signed)
        self._put_in_force(signed)
        return signed

    def _begin_epoch(self, document: ClusterDocument) -> None:
        """Sign, store and spread the first document of an epoch in which this node is the master.

        Raises:
            PmgsyncError: when it cannot be stored or put in force.
        """
        self._put_in_force(self._documents.begin_epoch(document))

    def _offer_document(self, cid: int, data: bytes) -> None:
        try:
            taken = self._documents.offer(data)
        except SplitBrainError:
            self._splits.note(cid, SignedDocument.unpack(data))
            raise
        if taken is not None:
            self._put_in_force(taken)
        elif self._documents.replaces(data):
            self._part().answer_offer(cid)

    def _spread_split(self) -> None:
        self._local.spread_document()

    def _held_document(self) -> ClusterDocument | None:
        return self._documents.signed.document if self._documents.signed is not None else None

    def _leave_behind(self, held: ClusterDocument, taken: ClusterDocument) -> None:
        part = self._participation
        note_left_behind(
            self._divergence,
            held,
            taken,
            cid=self._documents.cid,
            lives=part.lives() if part is not None else {},
            leading=part.leading if part is not None else None,
        )

    def _leave_for_now(self) -> None:
        """Leave the cluster until the document can be put in force; `_retry` tries that again."""
        self._leave()
        ports = self._resources.ports
        for port in (ports.events, ports.control, ports.join):
            port.fail_when_taken()
        self._documents.put_in_force(None)
        self._failed = True

    def _retry(self) -> None:
        self._resources.conf_file.retry()
        if self._failed:
            try:
                self._put_in_force(self._state.document())
            except PmgsyncError as error:
                log.error("action=document-refused error=%s", error)

    def _leave(self) -> None:
        if self._participation is not None:
            self._participation.close()
            self._participation = None

    # -- what the command line asks (`broker.requests.admin.Node`) ----------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the map of `pmgcm status --json`."""
        return self._part().health.status()

    def require_master(self) -> None:
        """Return on the master only; raises MembershipError on any other node."""
        self._documents.master_document()

    def create_cluster(self, cluster: bytes, name: str, profile: str, used: int) -> None:
        """Make this node the master of a new cluster."""
        founder = own_member(self.config, self._resources.keys)
        settings = self.config.cluster
        created = self._documents.create(
            cluster,
            name,
            profile,
            founder,
            fence_wanted=settings.fence,
            lease_ms=round(settings.lease_s * 1000),
            used=used,
        )
        self._put_in_force(created)

    def enter_cluster(self, signed: SignedDocument) -> None:
        """Take the place that a master has given this node."""
        self._divergence.forget_pending()
        self._put_in_force(self._documents.enter(signed))

    def take_document(self, signed: SignedDocument) -> dict[str, Any]:
        """Take a document that the administrator has had fetched, if it is newer; return what is in force then."""
        before = self._documents.document.version
        self._offer_document(signed.document.master, signed.pack())
        epoch, serial = self._documents.document.version
        return {"epoch": epoch, "serial": serial, "taken": (epoch, serial) != before}

    def leave_cluster(self) -> None:
        """Forget the cluster."""
        self._documents.refuse_to_leave()
        self._put_in_force(None)
        self._documents.leave()
        self._divergence.forget_pending()

    def decide_split(self, *, dry: bool) -> dict[str, Any]:
        """Keep this side of a split, on its master; `dry`: only say what would be."""
        self._documents.master_document()
        document = self._splits.decision(self._documents.cid, self._voter.record.epoch)
        result = {"epoch": document.epoch, "problem": self._splits.problem()}
        if not dry:
            self._put_in_force(self._documents.change(document))
        return result

    def delete_member(self, cid: int) -> None:
        """Remove a member, on the master only."""
        member = self._documents.master_document().member(cid)
        self._put_in_force(self._documents.delete(cid))
        if member is not None:
            self._resources.tokens.forget(member.curve_key)

    def promotion_plan(self, *, force: bool) -> dict[str, Any]:
        """Return the map of `pmgcm promote --dry-run --json`."""
        return self._part().leading.plan(force=force)

    def promote(self, send: Send, request: int, *, force: bool, agreed: bool) -> None:
        """Make this node the master; each step is told, and the end."""
        self._part().leading.promotion.begin(send, request, force=force, agreed=agreed)

    def set_synchronous(self, setting: Setting) -> None:
        """Set synchronous mode, on the master only."""
        self._documents.master_document()
        self._part().synchronous.change(setting)

    def update_member(self, session: Session, send: Send, message: Message) -> bool:
        """Have what this node shows of itself changed in the document; it is answered when that is in force."""
        return self._part().keys.handle_local(session, send, message)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def _part(self) -> Participation:
        if self._participation is None:
            held = self._documents.signed
            raise was_removed(held.document) if held is not None and not self._documents.cid else no_cluster()
        return self._participation

    def _workers(self) -> WorkerRequests:
        return self._part().workers

    def _membership(self) -> tuple[int, SignedDocument | None]:
        return (self._participation.cid, self._documents.signed) if self._participation is not None else (0, None)

    def _departed(self) -> list[int]:
        return self._participation.departed.origins if self._participation is not None else []

    def _session_over(self, session: Session) -> None:
        if session.worker not in CLIENTS:
            log.warning("action=worker-gone worker=%s", session.worker)
        if self._participation is not None:
            self._participation.session_over(session)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        if self._participation is not None:
            self._participation.beat()

    def _send_acks(self) -> None:
        if self._participation is not None:
            self._participation.send_acks()

    def _keep_lease(self) -> None:
        if self._participation is not None:
            self._participation.leading.tick()
            self._participation.synchronous.tick()
            if self._participation.leading.hurries and not self._hurries:
                self._hurries = True
                self._hurry()

    def _hurry(self) -> None:
        part = self._participation
        self._hurries = part is not None and part.leading.hurries
        if part is not None and self._hurries:
            part.leading.hurry()
            self._loop.once(HURRY_S, self._hurry)

    def _tick(self) -> None:
        self._sessions.expire()
        if self._participation is not None:
            self._participation.tick()

    def _bind_rest(self) -> None:
        """Bind the ports that could not be bound at once."""
        if self._participation is not None:
            try:
                self._participation.open_ports()
            except PmgsyncError as error:
                log.error("action=bind-failed error=%s", error)
                self._leave_for_now()
