"""Logical messages of pmgsync's own: sealed by the database they are written in, checked before they travel. Pure.

Every session of a database may write logical messages under any prefix, but what pmgsync says in them is carried out
with a superuser's rights on the other nodes: changes of the schema above all, and the ceilings of sequences. So the
database seals them with a key that only superusers can read, and capture drops what is not sealed with it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

OWN = b"pmgsync."
"""What the prefixes of messages that travel begin with. A barrier's is `pmgsync`: it is only to be passed."""
SEAL_BYTES = 32
_PREFIX_AT = 10
_TRANSACTIONAL = b"\1"
_length = struct.Struct(">I")


class SealKey(NamedTuple):
    """Two independent keys of 64 bytes each, for HMAC-SHA256 as SQL can compute it with sha256 alone (NMAC).

    Source: Bellare, Canetti, Krawczyk, "Keying Hash Functions for Message Authentication".
    """

    inner: bytes
    outer: bytes

    def seal(self, prefix: bytes, content: bytes) -> bytes:
        """Return the seal of a message, 32 bytes that its content begins with."""
        return hashlib.sha256(self.outer + hashlib.sha256(self.inner + prefix + b"\0" + content).digest()).digest()


def is_own(message: bytes) -> bool:
    """Return True when a pgoutput Message is meant to travel. One that is not transactional is at no certain place of
    the stream and never does."""
    return message[1:2] == _TRANSACTIONAL and message.startswith(OWN, _PREFIX_AT)


def unsealed(message: bytes, key: SealKey) -> bytes | None:
    """Return a message of pmgsync's own as it travels, without its seal; None when it was not sealed with the key."""
    end = message.index(0, _PREFIX_AT)
    head, at = message[: end + 1], end + 5
    seal, content = message[at : at + SEAL_BYTES], message[at + SEAL_BYTES :]
    if not hmac.compare_digest(key.seal(message[_PREFIX_AT:end], content), seal):
        return None
    return head + _length.pack(len(content)) + content
