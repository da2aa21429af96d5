"""Votes: what a member signs to let another be the master of an epoch. Pure values and signatures.

A vote names the cluster, the epoch, the candidate, and the very document (by its SHA-256) that the candidate will make
the new epoch from. So it cannot be used for another epoch, candidate or list of members, and whoever has that document
can count the votes by itself. When a member may vote is decided in `epochs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pmgsync.errors import ProtocolError

SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Vote:
    """A member's signature under a ballot; the rest of the ballot stands in the document that carries the vote."""

    cid: int
    signature: bytes

    def to_map(self) -> dict[str, Any]:
        return {"cid": self.cid, "signature": self.signature.hex()}

    @classmethod
    def from_map(cls, data: Mapping[str, Any]) -> Vote:
        """Return the vote a map describes.

        Raises:
            ProtocolError: when it is malformed.
        """
        cid, signature = data.get("cid"), data.get("signature")
        if type(cid) is not int or cid < 1:
            raise ProtocolError(f"a vote's cid is {cid!r:.80}")
        if not isinstance(signature, str) or not re.fullmatch(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}", signature):
            raise ProtocolError(f"the vote of CID {cid} has no signature of {SIGNATURE_BYTES} bytes")
        return cls(cid, bytes.fromhex(signature))


@dataclass(frozen=True, slots=True)
class Ballot:
    """What is voted on: that `candidate` be the master of `epoch`.

    Attributes:
        base: SHA-256 of the body of the document that the new epoch is made from.
    """

    cluster: bytes
    epoch: int
    candidate: int
    base: bytes

    def to_bytes(self, voter: int) -> bytes:
        """Return what a voter signs: JSON text (UTF-8, keys sorted, no white space)."""
        text = {**self.to_map(), "kind": "vote", "voter": voter}
        return json.dumps(text, sort_keys=True, separators=(",", ":")).encode()

    def to_map(self) -> dict[str, Any]:
        return {
            "base": self.base.hex(),
            "candidate": self.candidate,
            "cluster": self.cluster.hex(),
            "epoch": self.epoch,
        }

    @classmethod
    def from_map(cls, data: Mapping[str, Any]) -> Ballot:
        """Return the ballot a map describes.

        Raises:
            ProtocolError: when it is malformed.
        """
        try:
            cluster, base = bytes.fromhex(data["cluster"]), bytes.fromhex(data["base"])
            epoch, candidate = data["epoch"], data["candidate"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a ballot cannot be read ({type(error).__name__}: {error})") from error
        if type(epoch) is not int or type(candidate) is not int or not 0 < epoch < 2**62 or candidate < 1:
            raise ProtocolError(f"a ballot's epoch or candidate is {epoch!r:.40}, {candidate!r:.40}")
        return cls(cluster, epoch, candidate, base)

    def sign(self, voter: int, key: Ed25519PrivateKey) -> Vote:
        """Return a member's vote. It must be on the voter's disk before it is sent."""
        return Vote(voter, key.sign(self.to_bytes(voter)))

    def proves(self, vote: Vote, sign_key: bytes) -> bool:
        """Return True when the vote is this voter's, for this ballot."""
        try:
            Ed25519PublicKey.from_public_bytes(sign_key).verify(vote.signature, self.to_bytes(vote.cid))
        except (InvalidSignature, ValueError):
            return False
        return True


def digest(body: bytes) -> bytes:
    """Return the SHA-256 by which a ballot names a document."""
    return hashlib.sha256(body).digest()
