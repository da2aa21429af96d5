"""A node's identity as the sockets and the signatures need it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class NodeKeys:
    """A CURVE key pair for connections and an Ed25519 key for cluster documents. Never logged."""

    curve_public: bytes
    curve_secret: bytes
    sign_private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return "NodeKeys(...)"

    @property
    def sign_public(self) -> bytes:
        """The public half of the signing key, 32 bytes."""
        return self.sign_private.public_key().public_bytes_raw()
