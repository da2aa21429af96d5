"""A member's wish to have other keys, and the proof that it may. Pure values and signatures.

The wish comes over a connection of the old CURVE key. It is signed with the old signing key, so that a CURVE key alone
is not enough to take a member's place, and with the new one, so that nobody names a key that he does not have. It says
which key it replaces: the same wish cannot be used again later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pmgsync.core.document import ClusterDocument
from pmgsync.core.members import KEY_BYTES
from pmgsync.core.votes import SIGNATURE_BYTES
from pmgsync.errors import MembershipError, ProtocolError


@dataclass(frozen=True, slots=True)
class KeyChange:
    """Public keys that a member is to have, 32 bytes each.

    Attributes:
        replaces: its present CURVE key.
    """

    cluster: bytes
    cid: int
    replaces: bytes
    curve_key: bytes
    sign_key: bytes

    def to_bytes(self) -> bytes:
        """Return what is signed: JSON text (UTF-8, keys sorted, no white space)."""
        text = {
            "cid": self.cid,
            "cluster": self.cluster.hex(),
            "curve_key": self.curve_key.hex(),
            "kind": "keys",
            "replaces": self.replaces.hex(),
            "sign_key": self.sign_key.hex(),
        }
        return json.dumps(text, sort_keys=True, separators=(",", ":")).encode()

    def proof(self, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> dict[str, bytes]:
        """Return the keys of a message that ask for the change."""
        body = self.to_bytes()
        return {
            "curve_key": self.curve_key,
            "sign_key": self.sign_key,
            "by_old": old.sign(body),
            "by_new": new.sign(body),
        }

    @classmethod
    def read(cls, message: Mapping[str, Any], document: ClusterDocument, cid: int) -> Self:
        """Return the change that a member asks for, when it has proved that it may.

        Args:
            document: the cluster document in force.
            cid: of the member whose connection the message came over.

        Raises:
            ProtocolError: when the message is malformed.
            MembershipError: when a signature does not hold.
        """
        member = document.member(cid)
        if member is None:
            raise MembershipError(f"no member has CID {cid}")
        curve_key, sign_key = (_bytes(message, name, KEY_BYTES) for name in ("curve_key", "sign_key"))
        change = cls(document.cluster, cid, member.curve_key, curve_key, sign_key)
        for which, key in (("old", member.sign_key), ("new", sign_key)):
            signature = _bytes(message, f"by_{which}", SIGNATURE_BYTES)
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(signature, change.to_bytes())
            except (InvalidSignature, ValueError) as error:
                raise MembershipError(
                    f"a change of the keys of {member.name} ({cid}) is not signed with its {which} key"
                ) from error
        return change


def _bytes(message: Mapping[str, Any], name: str, length: int) -> bytes:
    value = message.get(name)
    if not isinstance(value, bytes) or len(value) != length:
        raise ProtocolError(f"a change of keys has no {name} of {length} bytes")
    return value
