"""New epochs for clusters under test: documents made with the members' own keys, and offered to a running broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import zmq

from broker.cluster.remote import remote_member
from broker.cluster.state_directory import StateDirectory
from pmgsync.core.document import Fork
from pmgsync.core.membership import SignedDocument, new_epoch, sign
from pmgsync.core.positions import parse_lsn
from pmgsync.errors import MembershipError
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.lease import note_reign
from pmgsync.postgres.setup.sequence_values import pass_rows
from pmgsync.profile_file import load_profile
from pmgsync.wire.messages import pack
from tests.harness.cluster import Node, eventually


def held(node: Node) -> SignedDocument:
    """Return the document that a node has on disk."""
    signed = StateDirectory(node.state_dir).document()
    assert signed is not None
    return signed


def cid_of(node: Node) -> int:
    """Return a node's number."""
    member = held(node).document.by_key(StateDirectory(node.state_dir).keys().curve_public)
    assert member is not None
    return member.cid


def applied(node: Node, origin: int) -> Fork:
    """Return how far a node's database has applied a chain."""
    ((incarnation, lsn),) = node.sql("SELECT incarnation, lsn::text FROM pmgsync.position WHERE origin = %s", (origin,))
    return Fork(incarnation, parse_lsn(lsn))


def own_end(node: Node) -> Fork:
    """Return where a node's own chain is now."""
    ((incarnation,),) = node.sql("SELECT incarnation FROM pmgsync.node")
    ((lsn,),) = node.sql("SELECT pg_current_wal_insert_lsn()::text")
    return Fork(incarnation, parse_lsn(lsn))


def make_epoch(
    master: Node, *, before: Node | None, voters: Iterable[Node], forced: bool = False, fork: Fork | None = None
) -> SignedDocument:
    """Return the first document of the next epoch.

    Args:
        before: the master before; its chain is left where the new master has applied it.
        voters: whose votes it carries.
    """
    base = held(master)
    cid = cid_of(master)
    epoch = base.document.epoch + 1
    ballot = base.ballot(epoch, cid)
    votes = [] if forced else [
        ballot.sign(cid_of(one), StateDirectory(one.state_dir).keys().sign_private) for one in voters
    ]  # fmt: skip
    if fork is None and before is not None:
        fork = applied(master, cid_of(before))
    document = new_epoch(
        base.document, cid, epoch=epoch, fork=fork, start=own_end(master), when=time.time_ns() // 1000,
        reason="a test", votes=votes, forced=forced,
    )  # fmt: skip
    return sign(document, cid, StateDirectory(master.state_dir).keys().sign_private, after=base)


def offer(node: Node, signed: SignedDocument, *, by: Node) -> None:
    """Offer a document to a node's broker in the name of another member, until it is in force."""
    keys, there = StateDirectory(by.state_dir).keys(), StateDirectory(node.state_dir).keys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.curve_serverkey = zmq.utils.z85.encode(there.curve_public)
    socket.curve_publickey = zmq.utils.z85.encode(keys.curve_public)
    socket.curve_secretkey = zmq.utils.z85.encode(keys.curve_secret)
    socket.connect(f"tcp://{node.address}:{node.control}")
    try:

        def taken() -> bool:
            socket.send_multipart([pack({"op": "offer"}), signed.pack()])
            return held(node).document.history == signed.document.history

        eventually(taken, what=f"{node.name} takes epoch {signed.document.epoch}")
    finally:
        socket.close()
        context.term()


def voted(voter: Node, candidate: Node) -> bool:
    """Ask a node's broker for a vote in the next epoch, in the name of another member; True when it was given."""
    base, keys = held(voter), StateDirectory(candidate.state_dir).keys()
    member = base.document.member(cid_of(voter))
    assert member is not None
    ballot = base.ballot(base.document.epoch + 1, cid_of(candidate)).to_map()
    with remote_member(member, keys) as peer:
        try:
            peer.request({"op": "vote", "ballot": ballot})
        except MembershipError:
            return False
    return True


def promote(
    master: Node, *, before: Node | None, voters: Iterable[Node], forced: bool = False, by: Node | None = None
) -> SignedDocument:
    """Make a node the master of a new epoch, at the place that it has applied; its broker must run.

    Args:
        by: the member in whose name the document is offered; None: another one of those named.
    """
    signed = make_epoch(master, before=before, voters=voters, forced=forced)
    offer(master, signed, by=by or next(one for one in [before, *voters] if one is not None and one is not master))
    pass_sequences(master, signed.document.epoch)
    return signed


def pass_sequences(node: Node, epoch: int) -> None:
    """Set a node's sequences past every value used: then it may open its tables in an epoch."""
    with contextlib.closing(connect(node.server.dsn(node.dbname), application_name="test")) as connection:
        pass_rows(connection, load_profile(node.profile))
        with connection.cursor() as cursor:
            note_reign(cursor, epoch)
        connection.commit()
