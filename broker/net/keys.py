"""A node's identity as the sockets and the signatures need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from zmq.utils import z85

from pmgsync.core.membership import ClusterDocument


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair for connections and an Ed25519 key for cluster documents. Never logged."""

    curve_public: bytes
    curve_secret: bytes
    sign_private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Self:
        """Return new keys."""
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret), Ed25519PrivateKey.generate())

    def __repr__(self) -> str:
        return "KeyPair(...)"

    @property
    def sign_public(self) -> bytes:
        """The public half of the signing key, 32 bytes."""
        return self.sign_private.public_key().public_bytes_raw()


MAX_OLD = 8


@dataclass
class NodeKeys:
    """The keys that a node has now, those that it may have next, and old ones that not everybody has forgotten.

    Which of them counts is what the cluster document in force names: a change of keys is decided there, and may have
    been decided while this node was away.

    Attributes:
        pending: made, and perhaps in the document already.
        old: newest first. Somebody who was away may still know this node by one of them alone.
    """

    current: KeyPair
    pending: KeyPair | None = None
    old: tuple[KeyPair, ...] = field(default=())

    def __repr__(self) -> str:
        return "NodeKeys(...)"

    @property
    def curve_public(self) -> bytes:
        return self.current.curve_public

    @property
    def curve_secret(self) -> bytes:
        return self.current.curve_secret

    @property
    def sign_private(self) -> Ed25519PrivateKey:
        return self.current.sign_private

    @property
    def sign_public(self) -> bytes:
        """The public half of the signing key, 32 bytes."""
        return self.current.sign_public

    @property
    def others(self) -> Iterator[KeyPair]:
        """All keys but the present ones, the likeliest first."""
        if self.pending is not None:
            yield self.pending
        yield from self.old

    def follow(self, document: ClusterDocument) -> bool:
        """Use the keys that a document names; True when these are others than before. It may name none of them."""
        if document.by_key(self.curve_public) is not None:
            return False
        named = next((pair for pair in self.others if document.by_key(pair.curve_public) is not None), None)
        if named is None:
            return False
        rest = [pair for pair in (self.current, self.pending, *self.old) if pair is not None and pair is not named]
        self.current, self.pending, self.old = named, None, tuple(rest[:MAX_OLD])
        return True

    def reset(self) -> Self:
        """Return the present keys alone."""
        return replace(self, pending=None, old=())
