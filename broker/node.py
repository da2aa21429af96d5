"""The broker of one node: chains, journals, peers and local sessions, wired together. It decides nothing by itself."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import zmq

from broker.chains.follower import Follower
from broker.chains.publishing import Publishing
from broker.chains.streams import Streams
from broker.chains.trimming import Retainer
from broker.cluster.roster import Roster
from broker.cluster.state_directory import NodeKeys, StateDirectory
from broker.cluster.tokens import Tokens
from broker.desks.local import LocalDesk
from broker.journal.journals import Journals
from broker.members.calls import Calls, End
from broker.members.links import PeerLink
from broker.net import sockets
from broker.net.loop import Loop, Socket
from broker.net.ports import Ports
from broker.status.health import Health
from broker.status.heartbeats import Applied, Heartbeat, OwnChain
from broker.status.lag import HeadClock
from pmgsync.config import NodeConfig
from pmgsync.core.chains import ChainHead
from pmgsync.core.frames import Frame, read_frame
from pmgsync.core.membership import ClusterDocument, SignedDocument, no_cluster
from pmgsync.core.positions import Position
from pmgsync.errors import (
    ConfigError,
    FrameDamagedError,
    JournalDamagedError,
    MembershipError,
    PmgsyncError,
    ProtocolError,
    UnknownChainError,
    UnreachableError,
)
from pmgsync.wire.messages import Message

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
ACK_S = 0.05
TICK_S = 0.25
RELOAD_S = 1.0
BIND_S = 0.05


class Broker:
    """One node's broker; `run` serves until `stop`."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.state = StateDirectory(config.state_dir)
        self.keys: NodeKeys = self.state.keys()
        self.loop = Loop()
        self.context: zmq.Context[Socket] = zmq.Context()
        ids = itertools.count(1)
        self.new_id: Callable[[], int] = partial(next, ids)
        self.roster = Roster(self.state, self.keys)
        self.journals: Journals | None = None
        self.streams: Streams | None = None
        self.calls = Calls(self.new_id)
        self.tokens = Tokens(time.monotonic)
        self.peers: dict[int, PeerLink] = {}
        self.followers: dict[int, Follower] = {}
        self._publishing: Publishing | None = None
        self.applied: dict[int, Applied] = {}
        self.acked: dict[int, dict[int, Applied]] = {}
        self.clocks: dict[int, HeadClock] = {}
        self.notes: list[str] = []
        self.damage: list[str] = []
        self._lost: dict[int, ChainHead] = {}
        self._ack_due = False
        self._ports = Ports(self)
        self._doorkeeper = sockets.Doorkeeper(self.context, self.loop, self.roster.cid_of_key)
        self.local = LocalDesk(self, sockets.bind_local(self.context, config.broker_socket))
        self.retainer = Retainer(self)
        self.health = Health(self)

    # -- life ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` is called."""
        self.reload()
        self.loop.every(HEARTBEAT_S, self._beat)
        self.loop.every(ACK_S, self._send_acks)
        self.loop.every(TICK_S, self._tick)
        self.loop.every(RELOAD_S, self._look_for_document)
        self.loop.every(BIND_S, self._bind_rest)
        try:
            self.loop.run()
        finally:
            self.close()

    def stop(self) -> None:
        """End `run` soon."""
        self.loop.stop()

    def close(self) -> None:
        """Close everything; what is accepted is written to the journal first."""
        self._leave_cluster()
        self.local.close()
        self._doorkeeper.close()
        self.context.destroy(linger=0)

    # -- the cluster document -----------------------------------------------------------------------------------------

    @property
    def signed(self) -> SignedDocument | None:
        """The signed document in force, None when no cluster is defined."""
        return self.roster.signed

    @property
    def cid(self) -> int:
        """This node's CID, 0 when it is not in a cluster."""
        return self.roster.cid

    @property
    def document(self) -> ClusterDocument:
        """The document in force; raises MembershipError when no cluster is defined."""
        return self.roster.document

    def master_document(self) -> ClusterDocument:
        """The document in force; raises MembershipError when this node is not the master."""
        return self.roster.master_document()

    def change_document(self, document: ClusterDocument) -> SignedDocument:
        """Sign, store and spread a new cluster document."""
        if self.signed is not None and document == self.signed.document:
            return self.signed
        signed = self.roster.store_change(document)
        self.reload()
        return signed

    def offer_document(self, data: bytes) -> None:
        """Take a cluster document from the network; raises PmgsyncError when it is not acceptable."""
        if self.roster.store_offered(data):
            self.reload()

    def _look_for_document(self) -> None:
        if self.roster.changed_on_disk():
            try:
                self.reload()
            except PmgsyncError as error:
                log.error("action=document-refused error=%s", error)

    def reload(self) -> None:
        """Read the cluster document again and bring connections and doors in line with it.

        Raises:
            ConfigError: when the document is damaged or a port is in use; it is tried again.
        """
        signed, cid = self.roster.load()
        try:
            self._put_in_force(signed, cid)
        except PmgsyncError:
            self._stand_aside()
            raise

    def _stand_aside(self) -> None:
        """Be in no cluster until the document can be put in force; it is tried again."""
        self._leave_cluster()
        self._ports.lose_patience()
        self.roster.signed = None
        self.roster.forget_stamp()

    def _put_in_force(self, signed: SignedDocument | None, cid: int) -> None:
        old = self.signed
        if signed is not None and old is not None and signed.body == old.body and self.cid:
            return
        if signed is None or cid == 0:
            if self.cid:
                log.warning("action=left-cluster cid=%d", self.cid)
            self._leave_cluster()
            self.roster.signed = signed
            self.local.spread_document()
            return
        self._check_identity(signed, cid)
        if self.cid and (cid != self.cid or (old and old.document.cluster != signed.document.cluster)):
            self._leave_cluster()
        removed = old is not None and bool(old.document.cids - signed.document.cids) and self.cid != 0
        if removed:
            # Whoever is being removed should learn it from the document, not from silence.
            self.publish(b"d", signed.pack())
        self.roster.signed, self.roster.cid = signed, cid
        log.info("action=document cid=%d epoch=%d serial=%d", cid, signed.document.epoch, signed.document.serial)
        if self.journals is None:
            self._open_journals()
        if removed:
            self._ports.cut()
        self._ports.bind(master=signed.document.master == cid)
        self.publish(b"d", signed.pack())
        self._meet_members(signed.document)
        self.local.spread_document()
        self._beat()

    def _check_identity(self, signed: SignedDocument, cid: int) -> None:
        """Refuse to be a second node of one CID: a copied state directory comes with another address or name."""
        member = signed.document.member(cid)
        assert member is not None
        config = self.config
        if (member.name, member.address) != (config.name, config.address):
            raise ConfigError(
                f"the cluster knows node {cid} as {member.name} at {member.address}, "
                f"node.toml says {config.name} at {config.address}",
                hint="name and address cannot change later: correct node.toml, or delete the node and join anew; "
                "a copied state directory must not be started as a second node",
            )

    def _open_journals(self) -> None:
        self.journals = Journals(self.state.journal, self.cid)
        self.journals.start()
        self.streams = Streams(self.journals, self._damaged)
        self._publishing = Publishing(self, self.journals)
        self.loop.add_descriptor(self.journals.notify_fd, self._journal_moved)
        for origin in self.journals.chains():
            if origin != self.cid:
                self.followers[origin] = Follower(origin, self.journals, self)

    def _leave_cluster(self) -> None:
        for link in self.peers.values():
            link.close()
        self.peers.clear()
        self._ports.close()
        if self.journals is not None:
            self.loop.remove(self.journals.notify_fd)
            self.journals.close()
        self.journals = self.streams = self._publishing = None
        self.followers.clear()
        self.applied.clear()
        self.acked.clear()
        self.clocks.clear()
        self._lost.clear()
        self.roster.cid = 0

    def _bind_rest(self) -> None:
        if not self.cid:
            return
        try:
            self._ports.bind(master=self.document.master == self.cid)
        except PmgsyncError as error:
            log.error("action=bind-failed error=%s", error)
            self._stand_aside()

    def _meet_members(self, document: ClusterDocument) -> None:
        for cid, link in list(self.peers.items()):
            if document.member(cid) != link.member:
                link.close()
                del self.peers[cid]
                self.acked.pop(cid, None)
                self.calls.drop_owner(("peer", cid), UnreachableError(f"node {cid} has left the cluster"))
        for member in document.members:
            if member.cid not in self.peers and member.cid != self.cid:
                self.peers[member.cid] = PeerLink(
                    self.context, self.loop, self.keys, member,
                    on_event=self._event, on_control=self._control, on_rebuilt=self._rebuilt,
                )  # fmt: skip

    def publishing(self) -> Publishing:
        """The own chain; raises MembershipError when no cluster is defined."""
        if self._publishing is None:
            raise no_cluster()
        return self._publishing

    @property
    def own(self) -> OwnChain | None:
        """What the heartbeat says of the own chain."""
        return self._publishing.chain if self._publishing is not None else None

    def _journal_moved(self) -> None:
        self._journals().collect()
        self.publishing().journal_moved()

    # -- chains: what followers, streams and desks need ---------------------------------------------------------------

    def _journals(self) -> Journals:
        if self.journals is None:
            raise no_cluster()
        return self.journals

    def chain_heads(self) -> Mapping[int, ChainHead]:
        """Return the heads of all chains in the journal."""
        return self.journals.chains() if self.journals is not None else {}

    def heard_own(self, origin: int) -> OwnChain | None:
        """Return what a member last said of its own chain."""
        link = self.peers.get(origin)
        return link.heartbeat.own if link and link.heartbeat else None

    def follow(self, origin: int, incarnation: int, position: Position) -> None:
        """Begin or continue to keep a foreign chain whole, so that everything after `position` can be had."""
        journals = self._journals()
        head = self.chain_heads().get(origin)
        fresh = head is None or head.incarnation != incarnation
        if fresh:
            fresh = journals.open(origin, incarnation, position).position == position
        if position < journals.first(origin):
            journals.reset(origin, incarnation, position)
            fresh = True
        if origin not in self.followers:
            self.followers[origin] = Follower(origin, journals, self)
        elif fresh:
            self.followers[origin].reset()
        self.followers[origin].tick()

    def taken(self, frame: Frame) -> None:
        """A frame was taken into the journal."""
        assert self.streams is not None
        self.streams.offer(frame)
        self.note_head(frame.header.origin, self.chain_heads()[frame.header.origin])

    def fell_back(self, head: ChainHead) -> None:
        """The parts of a half transaction were dropped."""
        assert self.streams is not None
        self.streams.fall_back(head.origin, head.complete)

    def lost(self, origin: int, error: PmgsyncError) -> None:
        """A gap cannot be filled: begin behind it when apply has passed it, else say that a snapshot is needed."""
        assert self.streams is not None
        head = self.chain_heads()[origin]
        applied = self.applied.get(origin)
        if applied and applied.incarnation == head.incarnation and applied.position > head.complete:
            self._journals().reset(origin, head.incarnation, applied.position)
            self.followers[origin].reset()
            return
        if self._lost.get(origin) != head:
            # Found again and again until somebody has resynchronised, which may take long.
            self._lost[origin] = head
            log.error("action=resync-required origin=%d position=%s", origin, head.position)
        self.streams.fail(origin, error)

    def servers(self, origin: int, incarnation: int, position: Position) -> list[int]:
        """Return the connected members that hold what follows a position, the origin first."""
        found = [
            cid
            for cid, link in self.peers.items()
            if link.up
            and link.heartbeat is not None
            and (chain := link.heartbeat.chains.get(origin)) is not None
            and chain.incarnation == incarnation
            and chain.first <= position < chain.head
        ]
        return sorted(found, key=lambda cid: (cid != origin, cid))

    def behind_all(self, origin: int, incarnation: int, position: Position) -> bool:
        """Return True when every connected member that has the chain begins after the position."""
        firsts = [
            chain.first
            for link in self.peers.values()
            if link.up
            and link.heartbeat is not None
            and (chain := link.heartbeat.chains.get(origin)) is not None
            and chain.incarnation == incarnation
        ]
        link = self.peers.get(origin)
        return bool(firsts) and link is not None and link.up and all(first > position for first in firsts)

    def send_to(self, cid: int, message: Message) -> bool:
        """Send a control message to a member; False when it is not connected."""
        link = self.peers.get(cid)
        return link is not None and link.send(message)

    def _damaged(self, origin: int, position: Position, error: JournalDamagedError) -> None:
        """Give up what cannot be read: other members may have it, or a snapshot replaces it."""
        first = self._journals().pass_damage(origin, position)
        log.error("action=journal-damaged origin=%d position=%s first=%s error=%s", origin, position, first, error)
        self.damage = [*self.damage[-9:], error.message]

    def note_head(self, origin: int, head: ChainHead) -> None:
        """Note for the lag where a chain's head is now."""
        clock = self.clocks.setdefault(origin, HeadClock())
        clock.note(time.monotonic(), head.incarnation, head.complete.lsn)

    # -- from the members ---------------------------------------------------------------------------------------------

    def _event(self, link: PeerLink, parts: Sequence[zmq.Frame]) -> None:
        try:
            match [part.bytes for part in parts]:
                case [b"f", header, body]:
                    self._foreign_frame(link, header, body)
                case [b"h", data]:
                    self._heartbeat(link, data)
                case [b"d", data]:
                    self.offer_document(data)
                case _:
                    raise ProtocolError(f"an event of {len(parts)} parts is not known here")
        except PmgsyncError as error:
            self.note(link.member.cid, error)

    def _foreign_frame(self, link: PeerLink, header: bytes, body: bytes) -> None:
        origin = link.member.cid
        follower = self.followers.get(origin)
        try:
            frame = read_frame(header, body)
        except FrameDamagedError:
            if follower is not None:
                follower.damaged += 1
            raise
        if frame.header.origin != origin or frame.header.cluster != self.document.cluster:
            raise ProtocolError(f"it published a frame of node {frame.header.origin}, or of another cluster")
        if follower is not None:
            follower.live(frame)

    def _heartbeat(self, link: PeerLink, data: bytes) -> None:
        heartbeat = Heartbeat.unpack(data)
        if heartbeat.cid != link.member.cid or heartbeat.cluster != self.document.cluster:
            raise ProtocolError("its heartbeat speaks for another node or cluster")
        link.heard(heartbeat)
        self.acked.setdefault(heartbeat.cid, {}).update(heartbeat.applied)
        if (heartbeat.epoch, heartbeat.serial) > self.document.version:
            link.send({"op": "document", "id": self.new_id()})
        own = heartbeat.own
        if own is None:
            return
        chain = heartbeat.chains.get(heartbeat.cid)
        if chain is None:
            return
        self.clocks.setdefault(heartbeat.cid, HeadClock()).note(
            heartbeat.received, own.incarnation, chain.head.lsn if chain.head.complete else chain.head.lsn - 1
        )
        head = self.chain_heads().get(heartbeat.cid)
        if head is None or heartbeat.cid not in self.followers:
            return
        if head.incarnation == own.incarnation:
            self.followers[heartbeat.cid].heard_head(chain.head)
        else:
            self.local.chain_replaced(heartbeat.cid, own.incarnation)

    def _control(self, link: PeerLink, parts: Sequence[zmq.Frame]) -> None:
        try:
            self.local.from_member(link.member.cid, [part.bytes for part in parts])
        except PmgsyncError as error:
            self.note(link.member.cid, error)

    def _rebuilt(self, link: PeerLink) -> None:
        for follower in self.followers.values():
            follower.server_gone(link.member.cid)
        reason = UnreachableError(f"the connection to {link.member.name} ({link.member.cid}) was lost")
        self.calls.drop_owner(("peer", link.member.cid), reason)

    # -- time ---------------------------------------------------------------------------------------------------------

    def publish(self, *parts: bytes) -> None:
        """Publish an event; nothing happens while there are no members' sockets."""
        self._ports.publish(*parts)

    def applied_moved(self, origin: int, applied: Applied) -> None:
        """Note what a local apply worker has committed."""
        self.applied[origin] = applied
        self._ack_due = True

    def note(self, cid: int, error: PmgsyncError) -> None:
        """Log why something that a member sent was refused, each reason once in a while, and have status show it."""
        text = f"node {cid}: {error}"
        link = self.peers.get(cid)
        # A member may well ask for what cannot be had now.
        if link is not None and not isinstance(error, UnreachableError | UnknownChainError):
            link.refuse(str(error))
        if text not in self.notes:
            log.warning("action=refused %s", text)
            self.notes = [*self.notes[-99:], text]

    def _beat(self) -> None:
        if self.cid:
            self.publish(b"h", self.health.heartbeat().pack())

    def _send_acks(self) -> None:
        if not self._ack_due or not self.cid:
            return
        self._ack_due = False
        durable = {
            origin: [head.incarnation, *self._journals().durable(origin)] for origin, head in self.chain_heads().items()
        }
        message = {
            "op": "ack",
            "epoch": self.document.epoch,
            "applied": {origin: [done.incarnation, *done.position] for origin, done in self.applied.items()},
            "durable": durable,
        }
        for link in self.peers.values():
            link.send(message)

    def _tick(self) -> None:
        self.local.sessions.expire()
        if self._publishing is not None:
            self._publishing.tick()
        if self.streams is not None:
            self.streams.expire()
        for follower in self.followers.values():
            follower.tick()
        for link in list(self.peers.values()):
            link.tick()
        self.retainer.tick()

    # -- calls --------------------------------------------------------------------------------------------------------

    def ask_agent(self, caller: End, method: str, message: Message | None = None) -> None:
        """Run a method of this node's agent for somebody.

        Raises:
            UnreachableError: when no worker serves it now.
        """
        session = self.local.sessions.serving(method)
        if session is None:
            raise UnreachableError(f"the agent of {self.config.name} is not running", hint="start pmgsync-agent there")
        identity = session.identity
        self.calls.begin(
            caller,
            identity,
            lambda reply, attachments: self.local.sessions.send(identity, reply, attachments),
            message or {"op": "call", "method": method, "args": {}, "credit": 1 << 20},
        )

    def ask_member(self, caller: End, target: int, message: Message) -> None:
        """Pass a call to another member.

        Raises:
            UnreachableError: when it is not connected.
            MembershipError: when there is no such member.
        """
        link = self.peers.get(target)
        if link is None:
            raise MembershipError(f"no member has CID {target}")
        self.calls.begin(caller, ("peer", target), lambda reply, parts: self._to_peer(target, reply, parts), message)

    def _to_peer(self, target: int, message: Mapping[str, object], parts: Sequence[bytes]) -> bool:
        link = self.peers.get(target)
        return link is not None and link.send(message, parts)
