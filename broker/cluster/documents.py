"""The cluster document in force on this node, and its one writer: the process that holds the state directory.

That process is the broker. While none runs, `pmgcm create` and `pmgcm join` may do it in its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from broker.cluster.state_directory import StateDirectory
from broker.net.keys import NodeKeys
from pmgsync.core.membership import (
    ClusterDocument,
    Member,
    SignedDocument,
    accept_document,
    first_document,
    no_cluster,
    require_master,
    sign,
    was_removed,
    without_member,
)
from pmgsync.core.signed import Order, compare
from pmgsync.errors import MembershipError, ProtocolError


class Judge(Protocol):
    """Says what this node's votes let it do with documents."""

    @property
    def may_lead(self) -> bool:
        """True when this node acts as master."""

    def refuse_change(self, new: ClusterDocument) -> None:
        """Refuse a change of who is a member while the one before could still be lost; raises MembershipError."""

    def may_take(self, offered: SignedDocument) -> bool:
        """Say whether an offered document is to be taken; raises MembershipError when it cannot be believed."""

    def follow(self, signed: SignedDocument | None, cid: int) -> None:
        """Take over that a document is in force, or none."""


Leave = Callable[[ClusterDocument, ClusterDocument], None]


class Documents:
    """Reads, changes and stores the document.

    Attributes:
        keys: this node's; the document in force says which of them it uses.
        signed: the document in force, None when no cluster is defined; also that of a cluster that has removed this
            node.
        cid: this node's number in it, 0 when it is not a member (any more).
    """

    def __init__(
        self, state: StateDirectory, keys: NodeKeys, judge: Judge | None = None, *, leave: Leave | None = None
    ) -> None:
        """Begin; without a judge, for a process that takes nothing from the network and changes no document.

        Args:
            leave: is called with the document held and the one that is about to be stored in its place, and writes down
                what does not count any more: afterwards the old history is gone.
        """
        self._leave_behind = leave
        self._state = state
        self.keys = keys
        self._judge = judge
        self.signed: SignedDocument | None = None
        self.cid = 0

    def load(self) -> None:
        """Take the document that is on disk.

        Raises:
            ConfigError: when it is damaged.
        """
        self.put_in_force(self._state.document())

    def put_in_force(self, signed: SignedDocument | None) -> None:
        """Put a document in force, or none."""
        if signed is not None:
            self.keys.follow(signed.document)
        member = signed.document.by_key(self.keys.curve_public) if signed is not None else None
        self.signed, self.cid = signed, member.cid if member is not None else 0
        if self._judge is not None:
            self._judge.follow(self.signed, self.cid)

    @property
    def document(self) -> ClusterDocument:
        """The document in force.

        Raises:
            MembershipError: when no cluster is defined.
        """
        if self.signed is None:
            raise no_cluster()
        if not self.cid:
            raise was_removed(self.signed.document)
        return self.signed.document

    def packed(self) -> bytes:
        """Return the signed document in force, as it travels.

        Raises:
            MembershipError: when no cluster is defined.
        """
        if self.signed is None or not self.cid:
            raise no_cluster() if self.signed is None else was_removed(self.signed.document)
        return self.signed.pack()

    def master_document(self) -> ClusterDocument:
        """The document in force, on the master only.

        Raises:
            MembershipError: on any other node, and on a master that has voted for another.
        """
        document = require_master(self.document, self.cid)
        self._refuse_to_lead()
        return document

    def _refuse_to_lead(self) -> None:
        """Refuse when this master has voted for another, or cannot tell."""
        if self._judge is not None and not self._judge.may_lead:
            raise MembershipError(
                "this master has voted in a later epoch, or cannot tell what it has voted: it changes nothing any more",
                hint="`pmgcm status` says more; when nobody was promoted, promote a node",
            )

    def is_member_of(self, cluster: bytes) -> bool:
        """Return True when this node is in the cluster with an id."""
        return self.signed is not None and self.cid != 0 and self.signed.document.cluster == cluster

    def cid_of_key(self, key: bytes) -> int:
        """Return the CID of the member with a CURVE public key, 0 for a stranger."""
        member = self.signed.document.by_key(key) if self.signed is not None and self.cid else None
        return member.cid if member else 0

    def was_removed(self, key: bytes) -> bool:
        """Return True when a CURVE public key is that of a node that was removed."""
        return self.signed is not None and self.cid != 0 and key in self.signed.document.removed

    # -- changes ------------------------------------------------------------------------------------------------------

    def create(
        self,
        cluster: bytes,
        name: str,
        profile: str,
        founder: Member,
        *,
        fence_wanted: str,
        lease_ms: int,
        used: int = 0,
    ) -> SignedDocument:
        """Store the first document of a new cluster, unless that was done already.

        Args:
            fence_wanted: the fence from the third voter on.
            used: the highest CID that rows have from an earlier cluster.

        Raises:
            MembershipError: when a cluster is defined here already.
            ConfigError: when it cannot be written.
        """
        if self.signed is not None and self.is_member_of(cluster):
            return self.signed
        self.refuse_second()
        document = first_document(
            cluster,
            name,
            profile,
            founder,
            when=time.time_ns() // 1000,
            lease_ms=lease_ms,
            fence_wanted=fence_wanted,
            used=used,
        )
        return self._store(document, founder.cid)

    def enter(self, signed: SignedDocument) -> SignedDocument:
        """Store the document of a cluster that has taken this node in, unless that was done already.

        Raises:
            MembershipError: when a cluster is defined here already.
            ProtocolError: when this node is not a member there.
            ConfigError: when it cannot be written.
        """
        if self.signed is not None and self.is_member_of(signed.document.cluster):
            return self.signed
        self.refuse_second()
        if signed.document.by_key(self.keys.curve_public) is None:
            raise ProtocolError("this node is not in the cluster document that it was given")
        self._state.store_document(signed)
        return signed

    def refuse_second(self) -> None:
        """Refuse when this node is in a cluster; the document of one that it was removed from does not count.

        Raises:
            MembershipError: when it is.
        """
        if self.signed is not None and self.cid:
            raise MembershipError(
                "cluster already defined",
                hint=f"this node belongs to the cluster {self.signed.document.name!r}; `pmgcm status` shows it",
            )

    def delete(self, cid: int) -> SignedDocument:
        """Remove a member, on the master only.

        Raises:
            MembershipError: when this node is not the master, there is no such member, or it is the master.
            ConfigError: when the document cannot be written.
        """
        return self.change(without_member(self.master_document(), cid))

    def refuse_to_leave(self) -> None:
        """Refuse when others need this node: it is their master.

        Raises:
            MembershipError: when it is.
        """
        document = self.signed.document if self.signed is not None else None
        if document is not None and self.cid == document.master and len(document.members) > 1:
            raise MembershipError(
                "this node is the master, and others are in the cluster",
                hint="promote another node first, or `pmgcm delete` the others",
            )

    def leave(self) -> None:
        """Forget the cluster, whether it still counts this node in or not; without one nothing happens.

        Raises:
            MembershipError: when others need this node.
            ConfigError: when the document cannot be removed.
        """
        self.refuse_to_leave()
        if list(self.keys.others):
            self._state.store_keys(self.keys.reset())
        self._state.forget_cluster()
        self.put_in_force(None)

    def change(self, document: ClusterDocument) -> SignedDocument:
        """Sign a new document and store it.

        Raises:
            MembershipError: when this node has voted for another master.
            MembershipError, recoverable: when the last change of who is a member could still be lost.
            ConfigError: when it cannot be written.
        """
        if self.signed is not None and document == self.signed.document:
            return self.signed
        self._refuse_to_lead()
        if self._judge is not None:
            self._judge.refuse_change(document)
        elif self.signed is not None and len(self.signed.document.voters) > 2:
            raise MembershipError(
                "a cluster of three and more can only be changed while pmgsync-broker runs on its master",
                hint="start it: systemctl start pmgsync-broker",
            )
        return self._store(document, self.cid)

    def begin_epoch(self, document: ClusterDocument) -> SignedDocument:
        """Sign the first document of an epoch in which this node is the master, and store it.

        Raises:
            MembershipError: when it does not follow from the document in force.
            ConfigError: when it cannot be written.
        """
        if self.document.history != document.history[:-1] or document.master != self.cid:
            raise MembershipError("the cluster document has changed meanwhile", hint="run `pmgcm promote` again")
        return self._store(document, self.cid)

    def offer(self, data: bytes) -> SignedDocument | None:
        """Store a document from the network when it is newer and properly signed; None when it is not newer.

        Raises:
            PmgsyncError: when it is not acceptable.
        """
        offered = SignedDocument.unpack(data)
        if self.signed is None:
            return None
        judge = self._judge
        if not (accept_document(self.signed.document, offered) if judge is None else judge.may_take(offered)):
            return None
        self._leave(offered)
        self._state.store_document(offered)
        return offered

    def replaces(self, data: bytes) -> bool:
        """Return True when the document in force replaces an offered one: whoever offers it should be told."""
        held, offered = self.signed, SignedDocument.unpack(data).document
        return (
            held is not None
            and held.document.cluster == offered.cluster
            and (compare(offered, held.document) is Order.NEWER)
        )

    def _leave(self, taken: SignedDocument) -> None:
        held = self.signed
        if held is not None and self.cid and self._leave_behind is not None:
            self._leave_behind(held.document, taken.document)

    def _store(self, document: ClusterDocument, signer: int) -> SignedDocument:
        signed = sign(document, signer, self.keys.sign_private, after=self.signed)
        self._leave(signed)
        self._state.store_document(signed)
        return signed


@contextmanager
def offline_documents(state: StateDirectory) -> Iterator[Documents]:
    """Yield the documents of a node whose broker does not run.

    Raises:
        UnreachableError: when it does.
        ConfigError: when the state directory cannot be used.
    """
    with state.hold():
        documents = Documents(state, state.keys())
        documents.load()
        yield documents
