"""Signed cluster documents: which of two replaces the other, and whether it can be believed. Pure.

What a node holds changes by these rules alone, and needs nobody else's word for them:

1. Within an epoch only its master's signature counts, and the greater serial is newer. A master that changes its
   signing key signs that change with the old one; the documents before and after it are bases too.
2. A new epoch is signed by its master and carries the votes of a majority of those who had one in the document that it
   was made from (its base), or is marked as forced. The base travels with it, signed by the master before; so a node
   that has missed documents, even whole epochs, checks one step after the other from what it holds.
3. Nothing is forgotten: names and addresses of members, CIDs given out, epochs.

Invariant: two histories that differ were parted by a forced epoch, or the lower of two voted ones had reached no
majority. Where they part, what was voted for wins against what was forced, and the later vote against the earlier. Two
forced ones stand against each other until an administrator decides (`SplitBrainError`). Nobody goes to a lower epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pmgsync.core.document import ClusterDocument, Epoch
from pmgsync.core.members import Member
from pmgsync.core.votes import Ballot, digest
from pmgsync.errors import MembershipError, ProtocolError, SplitBrainError

MAX_DOCUMENT = 1 << 20
"""Bytes of a signed document with its bases."""
MAX_BASES = 64
"""Bases that travel with a document; who has missed more epochs and changes of keys joins anew."""
MAX_REKEYED = 16
"""Two for each change of the master's signing key."""


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A document with the bytes that were signed, the signer and the signature.

    Attributes:
        bases: the documents that the epochs up to this one were made from, and those around each change of the master's
            signing key, oldest first, at least the last one.
    """

    document: ClusterDocument
    body: bytes
    signer: int
    signature: bytes
    bases: tuple[SignedDocument, ...] = ()

    def pack(self) -> bytes:
        """Return the form that travels and is stored."""
        bases = [[base.body, base.signer, base.signature] for base in self.bases]
        packed = [self.body, self.signer, self.signature, *([bases] if bases else [])]
        return msgpack.packb(packed, use_bin_type=True)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> SignedDocument:
        """Return a signed document; its signature is not looked at here.

        Raises:
            ProtocolError: when it is malformed.
        """
        if len(data) > MAX_DOCUMENT:
            raise ProtocolError(f"a cluster document has {len(data)} bytes, expected at most {MAX_DOCUMENT}")
        try:
            value = msgpack.unpackb(data, raw=False, max_ext_len=0)
        except Exception as error:  # msgpack raises ValueError and its own types
            raise ProtocolError(f"a cluster document is malformed ({error})") from error
        if not isinstance(value, list) or len(value) < 3:
            raise ProtocolError("a cluster document is not a body, a signer and a signature")
        bases = value[3] if len(value) > 3 else []
        if not isinstance(bases, list) or len(bases) > MAX_BASES:
            raise ProtocolError(f"a cluster document's bases are not a list of at most {MAX_BASES}")
        return replace(_read(value), bases=tuple(_read(base) for base in bases))

    def verify(self, keys: ClusterDocument) -> None:
        """Check the signature with the signer's key in a document that is trusted.

        Raises:
            MembershipError: when the signer is not a member there, or the signature does not hold.
        """
        signer = keys.member(self.signer)
        if signer is None:
            raise MembershipError(f"a cluster document is signed by CID {self.signer}, who is not a member")
        try:
            Ed25519PublicKey.from_public_bytes(signer.sign_key).verify(self.signature, self.body)
        except (InvalidSignature, ValueError) as error:
            raise MembershipError(
                f"the signature of {signer.name} ({signer.cid}) on a cluster document is wrong"
            ) from error

    @property
    def changes_key(self) -> bool:
        """True when the master signed this with another key than it has from here on."""
        try:
            self.verify(self.document)
        except MembershipError:
            return True
        return False

    def ballot(self, epoch: int, candidate: int) -> Ballot:
        """Return what is voted on when a new epoch is to be made from this document."""
        return Ballot(self.document.cluster, epoch, candidate, digest(self.body))


def _read(value: object) -> SignedDocument:
    match value:
        case [bytes(body), int(signer), bytes(signature), *_]:
            return SignedDocument(ClusterDocument.from_json(body), body, signer, signature)
    raise ProtocolError("a cluster document is not a body, a signer and a signature")


def sign(
    document: ClusterDocument, signer: int, key: Ed25519PrivateKey, *, after: SignedDocument | None = None
) -> SignedDocument:
    """Return the document, signed by a member.

    Args:
        after: the signed document that it was made from; one of another cluster is not looked at. Without it a document
            of a later epoch than the first cannot be checked by whoever holds one of an earlier epoch.
    """
    bases: tuple[SignedDocument, ...] = ()
    if after is not None and after.document.cluster == document.cluster:
        rekeyed = after.changes_key or _changes_key(document, signer, key)
        bases = after.bases
        if rekeyed or after.document.epoch != document.epoch:
            bases = (*bases, replace(after, bases=()))
        if rekeyed:
            document = replace(document, rekeyed=(*document.rekeyed, digest(after.body))[-MAX_REKEYED:])
    body = document.to_json()
    signed = SignedDocument(document, body, signer, key.sign(body), bases[-MAX_BASES:])
    while len(signed.bases) > 1 and len(signed.pack()) > MAX_DOCUMENT // 2:
        signed = replace(signed, bases=signed.bases[1:])
    return signed


def _changes_key(document: ClusterDocument, signer: int, key: Ed25519PrivateKey) -> bool:
    member = document.member(signer)
    return member is not None and member.sign_key != key.public_key().public_bytes_raw()


class Order(Enum):
    """How an offered document stands to the one held, by their histories alone."""

    OLDER = "older or the same"
    NEWER = "newer"
    SPLIT = "neither replaces the other"


def compare(held: ClusterDocument, offered: ClusterDocument) -> Order:
    """Say which of two documents of one cluster replaces the other, if both are genuine."""
    common = 0
    for mine, theirs in zip(held.history, offered.history, strict=False):
        if mine != theirs:
            break
        common += 1
    my_tail, their_tail = held.history[common:], offered.history[common:]
    if not my_tail or not their_tail:
        return Order.NEWER if offered.version > held.version else Order.OLDER
    winner = _winner(my_tail, their_tail)
    if winner is their_tail:
        return Order.NEWER if offered.epoch >= held.epoch else Order.SPLIT
    if winner is my_tail:
        return Order.OLDER if held.epoch >= offered.epoch else Order.SPLIT
    return Order.SPLIT


def _winner(mine: Sequence[Epoch], theirs: Sequence[Epoch]) -> Sequence[Epoch] | None:
    """Return which of two tails of histories that part is to be followed, None when nobody has decided."""
    voted = [not any(entry.forced for entry in tail) for tail in (mine, theirs)]
    if voted[0] and voted[1]:
        # Two candidates had a majority each, one after the other: no majority has heard of the first, or it would not
        # have voted for a candidate that had not. The same epoch twice cannot be.
        return None if theirs[-1].epoch == mine[-1].epoch else max(mine, theirs, key=lambda tail: tail[-1].epoch)
    if voted[0] or voted[1]:
        return mine if voted[0] else theirs
    for winner, loser in ((mine, theirs), (theirs, mine)):
        decided = {pair for entry in winner for pair in entry.over}
        if all((entry.epoch, entry.master) in decided for entry in loser):
            return winner
    return None


def accept_document(held: ClusterDocument, offered: SignedDocument) -> bool:
    """Say whether an offered document replaces the one held.

    Returns:
        True when it is newer, False when it is the same or older.

    Raises:
        SplitBrainError: when both were forced, neither replaces the other, and an administrator has to decide.
        MembershipError: when it is newer but of another cluster, not signed by its epoch's master, without the votes
            that its epoch needs, or when it forgets what may not be forgotten.
    """
    new = offered.document
    if new.cluster != held.cluster:
        if new.version <= held.version:
            return False
        raise MembershipError("a cluster document of another cluster was offered")
    order = compare(held, new)
    if order is Order.OLDER:
        return False
    _check_steps(held, offered)
    if order is Order.SPLIT:
        raise SplitBrainError(
            f"epoch {new.epoch} of {_name(new, new.master)} and epoch {held.epoch} of {_name(held, held.master)} are "
            "both in force, because a promotion was forced",
            hint="an administrator has to decide which side stays; neither takes the other's document",
        )
    return True


def _check_steps(held: ClusterDocument, offered: SignedDocument) -> None:
    """Check every epoch, and every change of a master's key, that is in an offered document and not in the one held.

    Raises:
        MembershipError: when one does not hold.
    """
    line = [*offered.bases, offered]
    known = [number for number, one in enumerate(line) if _is_known(held, one.document)]
    if not known:
        raise MembershipError(
            f"the cluster document of epoch {offered.document.epoch} cannot be checked, for it does not carry the "
            f"documents between it and epoch {held.epoch}, which is held here",
            hint="delete this node on the master and join it anew",
        )
    newer = [number for number in known if line[number].document.version > held.version]
    if newer:
        # Each is signed with the key that its master has in the one before.
        first = line[newer[0]]
        _check_master(held, first)
        _check_kept(held, first.document)
        rest = line[newer[0] :]
    else:
        base, rest = line[known[-1]], line[known[-1] :]
        # The documents around a change of the master's key are not signed with the key that it has now, and older ones
        # that are would be a thief's work: the document held names those that were genuine.
        if base.document != held and digest(base.body) not in held.rekeyed:
            _check_master(held, base)
    for base, new in pairwise(rest):
        if new.document.history == base.document.history:
            if new.document.version <= base.document.version:
                raise MembershipError("the documents that a cluster document was made from are not in order")
            _check_master(base.document, new)
        else:
            _check_epoch(base, new)
        _check_kept(base.document, new.document)


def _is_known(held: ClusterDocument, document: ClusterDocument) -> bool:
    """True when a document is of an epoch that the document held has in its history."""
    return document.cluster == held.cluster and document.history == held.history[: len(document.history)]


def _check_master(keys: ClusterDocument, signed: SignedDocument) -> None:
    if signed.signer != signed.document.master:
        raise MembershipError(
            f"a cluster document is signed by CID {signed.signer}, but in epoch {signed.document.epoch} only its "
            f"master's signature counts, CID {signed.document.master}"
        )
    signed.verify(keys)


def _check_epoch(base: SignedDocument, new: SignedDocument) -> None:
    old, document, entry = base.document, new.document, new.document.history[-1]
    if document.history[:-1] != old.history or document.cluster != old.cluster:
        raise MembershipError(f"epoch {document.epoch} does not follow from the document that it carries as its base")
    master = old.member(document.master)
    if master is None or not master.may_be_master:
        raise MembershipError(f"CID {document.master} could not become master of epoch {document.epoch}")
    _check_master(old, new)
    if entry.forced:
        return
    ballot = base.ballot(entry.epoch, entry.master)
    keys = {member.cid: member.sign_key for member in old.members if member.votes}
    counted = {vote.cid for vote in entry.votes if vote.cid in keys and ballot.proves(vote, keys[vote.cid])}
    if not old.is_majority(counted):
        raise MembershipError(
            f"epoch {entry.epoch} has the votes of {len(counted)} members, expected {old.majority} of "
            f"{len(old.voters)}, or that it is marked as forced"
        )


def _check_kept(old: ClusterDocument, new: ClusterDocument) -> None:
    if new.max_cid < old.max_cid or new.history[: len(old.history)] != old.history:
        raise MembershipError("a cluster document that forgets CIDs or epochs was offered")
    if new.lease_ms != old.lease_ms:
        raise MembershipError("a cluster document with another length of the lease was offered")
    for member in new.members:
        before = old.member(member.cid)
        if before is None and member.cid <= old.max_cid:
            raise MembershipError(f"a cluster document that uses CID {member.cid} again was offered")
        if before is not None and (before.name, before.address) != (member.name, member.address):
            raise MembershipError(f"a cluster document with another name or address of CID {member.cid} was offered")


def _name(document: ClusterDocument, cid: int) -> str:
    member: Member | None = document.member(cid)
    return f"{member.name} ({cid})" if member else f"CID {cid}"
