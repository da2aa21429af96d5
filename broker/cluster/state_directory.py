"""The node's state directory: keys, votes and the cluster document, private, replaced as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.files import is_open
from broker.net.keys import KeyPair, NodeKeys
from pmgsync.core.members import KEY_BYTES
from pmgsync.core.membership import SignedDocument
from pmgsync.errors import ConfigError, ProtocolError, UnreachableError
from pmgsync.private_files import sync_directory, write_private

KEYS_FILE = "node.keys"
KEYS_VERSION = 2
DOCUMENT_FILE = "cluster.document"
LOCK_FILE = "lock"
VOTES_FILE = "votes.json"
TOKENS_FILE = "join.tokens"
HOLD_FILE = "hold"
HOLD_S = 5.0
"""For so long a process waits until another one releases the directory: `pmgcm` holds it for an instant only."""
HOLD_POLL_S = 0.05


class Hold:
    """The right to write the cluster document; the kernel takes it back when the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Release it; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
                self.store_keys(NodeKeys(KeyPair.generate()))
            if is_open(path):
                raise ConfigError(
                    f"other users can get at {path}",
                    hint=f"to close it: chmod 0600 {path}; when somebody may have read it, delete the node, remove the "
                    "file, and join again",
                )
            try:
                version, current, pending, old = msgpack.unpackb(path.read_bytes())
                if version != KEYS_VERSION:
                    raise ValueError("unknown version")
                return NodeKeys(_pair(current), _pair(pending) if pending else None, tuple(map(_pair, old)))
            except Exception as error:
                raise ConfigError(
                    f"the key file {path} cannot be read ({type(error).__name__})",
                    hint="restore it from a backup, or remove the state directory and join the cluster anew",
                ) from error

    def store_keys(self, keys: NodeKeys) -> None:
        """Replace the file of keys.

        Raises:
            ConfigError: when it cannot be written; the old one stays.
        """
        pending = _raw(keys.pending) if keys.pending is not None else None
        data = [KEYS_VERSION, _raw(keys.current), pending, [_raw(pair) for pair in keys.old]]
        write_private(self.path / KEYS_FILE, msgpack.packb(data))

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

    def store_document(self, signed: SignedDocument) -> None:
        """Replace the cluster document.

        Raises:
            ConfigError: when it cannot be written; the old one stays.
        """
        write_private(self.document_path, signed.pack())

    @property
    def votes_path(self) -> Path:
        return self.path / VOTES_FILE

    def votes(self) -> bytes | None:
        """Return the record of this node's votes and promises, None when there is none.

        Raises:
            ConfigError: when it cannot be read.
        """
        try:
            return self.votes_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(
                f"the record of this node's votes {self.votes_path} cannot be read ({error.strerror})",
                hint="see that this user may read it, and that its disk is well",
            ) from error

    def store_votes(self, data: bytes) -> None:
        """Replace the record of this node's votes and promises; it is on disk when this returns.

        Raises:
            ConfigError: when it cannot be written; the old one stays.
        """
        write_private(self.votes_path, data)

    @property
    def tokens_path(self) -> Path:
        return self.path / TOKENS_FILE

    def tokens(self) -> bytes | None:
        """Return the digests of the join tokens, None when there are none.

        Raises:
            ConfigError: when they cannot be read.
        """
        try:
            return self.tokens_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"the join tokens {self.tokens_path} cannot be read ({error.strerror})") from error

    def store_tokens(self, data: bytes) -> None:
        """Replace the digests of the join tokens.

        Raises:
            ConfigError: when they cannot be written; the old ones stay.
        """
        write_private(self.tokens_path, data)

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    def forget_cluster(self) -> None:
        """Remove the cluster document, the journals, the record of votes and the tokens; the keys stay.

        Raises:
            ConfigError: when they cannot be removed.
        """
        try:
            # The document last: as long as it is there, the same step can be done again.
            if self.journal.exists():
                shutil.rmtree(self.journal)
            self.document_path.unlink(missing_ok=True)
            # After it: a member that has a document must know what it has voted.
            self.votes_path.unlink(missing_ok=True)
            self.tokens_path.unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError as error:
            raise ConfigError(f"{error.filename or self.path} cannot be removed ({error.strerror})") from error

    def hold(self, *, timeout_s: float = HOLD_S) -> Hold:
        """Be the one process that writes the cluster document, until `close`.

        Raises:
            UnreachableError: when another process is, and stays so.
        """
        descriptor = os.open(self.path / HOLD_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Hold(descriptor)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise UnreachableError(
                        f"another process holds the state directory {self.path}",
                        hint="a pmgsync-broker runs on it already; two nodes need two state directories",
                    ) from None
                time.sleep(HOLD_POLL_S)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock that keeps two commands from making keys at once."""
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _raw(pair: KeyPair) -> list[bytes]:
    return [pair.curve_public, pair.curve_secret, pair.sign_private.private_bytes_raw()]


def _pair(raw: list[bytes]) -> KeyPair:
    curve_public, curve_secret, sign_private = raw
    if len(curve_public) != KEY_BYTES or len(curve_secret) != KEY_BYTES:
        raise ValueError("unknown length")
    return KeyPair(curve_public, curve_secret, Ed25519PrivateKey.from_private_bytes(sign_private))
