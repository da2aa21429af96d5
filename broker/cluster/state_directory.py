"""The node's state directory: its keys and the cluster document, private, replaced as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgpack
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from zmq.utils import z85

from pmgsync.core.membership import ClusterDocument, SignedDocument
from pmgsync.errors import ConfigError, ProtocolError

KEYS_FILE = "node.keys"
DOCUMENT_FILE = "cluster.document"
LOCK_FILE = "lock"


@dataclass(frozen=True)
class NodeKeys:
    """A node's identity: a CURVE key pair for connections, an Ed25519 key for cluster documents. Never logged."""

    curve_public: bytes
    curve_secret: bytes
    sign_private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return "NodeKeys(...)"

    @property
    def sign_public(self) -> bytes:
        return self.sign_private.public_key().public_bytes_raw()


def write_private(path: Path, data: bytes) -> None:
    """Replace a file by new content that only this user can read, surviving a crash at any instant.

    Raises:
        ConfigError: when it cannot be written.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})", hint="make room there, or see that this user may write it"
        ) from error


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable: a new name is not on disk until its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StateDirectory:
    """The files of a node's state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the state directory {path} cannot be made ({error.strerror})") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"the state directory {path} is not writable", hint="run pmgcm as root")

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def document_path(self) -> Path:
        return self.path / DOCUMENT_FILE

    def keys(self) -> NodeKeys:
        """Return the node's keys, made at the first call.

        Raises:
            ConfigError: when the file cannot be read or is not a key file.
        """
        path = self.path / KEYS_FILE
        with self.locked():
            if not path.exists():
                public, secret = zmq.curve_keypair()
                signing = Ed25519PrivateKey.generate()
                write_private(
                    path, msgpack.packb([1, z85.decode(public), z85.decode(secret), signing.private_bytes_raw()])
                )
            try:
                version, curve_public, curve_secret, sign_private = msgpack.unpackb(path.read_bytes())
                if version != 1 or len(curve_public) != 32 or len(curve_secret) != 32:
                    raise ValueError("unknown version or length")
                return NodeKeys(curve_public, curve_secret, Ed25519PrivateKey.from_private_bytes(sign_private))
            except Exception as error:
                raise ConfigError(
                    f"the key file {path} cannot be read ({type(error).__name__})",
                    hint="restore it from a backup, or remove the state directory and join the cluster anew",
                ) from error

    def document(self) -> SignedDocument | None:
        """Return the cluster document held, None when no cluster is defined.

        Raises:
            ConfigError: when the file is damaged or cannot be read.
        """
        try:
            data = self.document_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"the cluster document {self.document_path} cannot be read ({error.strerror})",
                hint="see that this user may read it, and that its disk is well",
            ) from error
        try:
            signed = SignedDocument.unpack(data)
        except ProtocolError as error:
            raise ConfigError(
                f"the cluster document {self.document_path} is damaged ({error.message})",
                hint="restore it from a backup, or remove the state directory and join the cluster anew",
            ) from error
        return signed

    def own_cid(self, document: ClusterDocument) -> int:
        """Return this node's CID in a document, 0 when it is not a member (any more)."""
        member = document.by_key(self.keys().curve_public)
        return member.cid if member else 0

    def store_document(self, signed: SignedDocument) -> None:
        """Replace the cluster document.

        Raises:
            ConfigError: when it cannot be written; the old one stays.
        """
        write_private(self.document_path, signed.pack())

    def drop_document(self) -> None:
        """Forget the cluster."""
        self.document_path.unlink(missing_ok=True)
        sync_directory(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that keeps two commands from making keys at once."""
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
