"""A stream of bytes in chunks that prove themselves: encrypted under a passphrase, or with a chain of checksums. Pure.

A file is a head and chunks. Each chunk is bound to the head, to its number and to whether it is the last one, so what
was cut off, left out, doubled, exchanged or changed shows. Under a passphrase nobody without it can make such a file;
without one the checksums find damage, not forgery.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pmgsync.errors import DamagedFileError, PassphraseError, ProtocolError

MAGIC = b"pmgsync backup\n"
VERSION = 1
CHUNK_BYTES = 256 << 10
"""Of the content; what is added to each chunk is `OVERHEAD_BYTES` at most."""
OVERHEAD_BYTES = 4 + 32
MAX_HEAD_BYTES = 1 << 10
SALT_BYTES = 16
KEY_BYTES, CHECK_BYTES = 32, 16
_LAST = 1 << 31

Read = Callable[[int], bytes]
"""Returns the next bytes, at most so many, b"" at the end."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What scrypt costs: 128 · n · r bytes of memory, and p times the work."""

    n: int = 1 << 17
    r: int = 8
    p: int = 1

    @property
    def bearable(self) -> bool:
        """False when a file asks for more than 1 GiB or 16 times the work, or for what scrypt does not take."""
        power = self.n > 1 and self.n & (self.n - 1) == 0
        return power and 0 < self.r <= 64 and 0 < self.p <= 16 and 128 * self.n * self.r <= 1 << 30


class Seal(ABC):
    """Seals and opens the chunks of one file."""

    def __init__(self, head: bytes) -> None:
        self._head = hashlib.sha256(head).digest()

    @abstractmethod
    def seal(self, number: int, data: bytes, *, last: bool) -> bytes:
        """Return a chunk."""

    @abstractmethod
    def open(self, number: int, chunk: bytes, *, last: bool) -> bytes:
        """Return what was sealed.

        Raises:
            ValueError: when this is not that chunk.
        """


class _Checksums(Seal):
    """Each chunk ends with the SHA-256 of the checksum before it, of itself and of its place."""

    def _sum(self, number: int, data: bytes, last: bool) -> bytes:
        self._head = hashlib.sha256(self._head + number.to_bytes(8, "big") + bytes([last]) + data).digest()
        return self._head

    def seal(self, number: int, data: bytes, *, last: bool) -> bytes:
        return data + self._sum(number, data, last)

    def open(self, number: int, chunk: bytes, *, last: bool) -> bytes:
        data, given = chunk[:-32], chunk[-32:]
        if not hmac.compare_digest(self._sum(number, data, last), given):
            raise ValueError
        return data


class _Cipher(Seal):
    """ChaCha20-Poly1305; a chunk's nonce is its place: the key is this file's own, by its salt."""

    def __init__(self, head: bytes, key: bytes) -> None:
        super().__init__(head)
        self._aead = ChaCha20Poly1305(key)

    @staticmethod
    def _nonce(number: int, last: bool) -> bytes:
        return bytes(3) + bytes([last]) + number.to_bytes(8, "big")

    def seal(self, number: int, data: bytes, *, last: bool) -> bytes:
        return self._aead.encrypt(self._nonce(number, last), data, self._head)

    def open(self, number: int, chunk: bytes, *, last: bool) -> bytes:
        try:
            return self._aead.decrypt(self._nonce(number, last), chunk, self._head)
        except InvalidTag as error:
            raise ValueError from error


def seal_chunks(
    pieces: Iterable[bytes], passphrase: tuple[bytes, bytes] | None, cost: Cost | None = None
) -> Iterator[bytes]:
    """Yield the bytes of a file that holds these pieces, joined.

    Args:
        passphrase: the passphrase, and `SALT_BYTES` random bytes that are used once; None: not encrypted.
        cost: of the passphrase.
    """
    seal: Seal
    if passphrase is None:
        head = _head({"cipher": "none"})
        seal = _Checksums(head)
    else:
        cost = cost or Cost()
        key, check = _derive(passphrase[0], passphrase[1], cost)
        head = _head(
            {
                "cipher": "chacha20-poly1305", "kdf": "scrypt", "salt": passphrase[1], "check": check,
                "n": cost.n, "r": cost.r, "p": cost.p,
            }
        )  # fmt: skip
        seal = _Cipher(head, key)
    yield head
    number, waiting = 0, bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) > CHUNK_BYTES:
            yield _framed(seal.seal(number, bytes(waiting[:CHUNK_BYTES]), last=False), last=False)
            del waiting[:CHUNK_BYTES]
            number += 1
    yield _framed(seal.seal(number, bytes(waiting), last=True), last=True)


def open_chunks(read: Read, passphrase: Callable[[], bytes]) -> Iterator[bytes]:
    """Yield the content of a file, chunk by chunk, each one proved. It is whole only when the iterator ends by itself.

    Args:
        passphrase: is asked when the file is encrypted.

    Raises:
        DamagedFileError: when something of it is missing or was changed.
        PassphraseError: when the passphrase is another one.
        ProtocolError: when it is no backup, or one of a later version.
    """
    seal = _opened(read, passphrase)
    number, last = 0, False
    while not last:
        size = int.from_bytes(_exactly(read, 4, number), "big")
        last, size = bool(size & _LAST), size & ~_LAST
        if size > CHUNK_BYTES + OVERHEAD_BYTES:
            raise _damaged(number)
        chunk = _exactly(read, size, number)
        try:
            data = seal.open(number, chunk, last=last)
        except ValueError:
            raise _damaged(number) from None
        yield data
        number += 1
    if read(1):
        raise DamagedFileError("the backup goes on behind its end", hint="it was damaged, or two were joined")


def is_encrypted(read: Read) -> bool:
    """Return whether a file asks for a passphrase.

    Raises:
        ProtocolError: when it is no backup.
    """
    return bool(_read_head(read)[1]["cipher"] != "none")


def _opened(read: Read, passphrase: Callable[[], bytes]) -> Seal:
    head, values = _read_head(read)
    match values:
        case {"cipher": "none"}:
            return _Checksums(head)
        case {"cipher": "chacha20-poly1305", "kdf": "scrypt", "salt": bytes(salt), "check": bytes(check),
              "n": int(n), "r": int(r), "p": int(p)}:  # fmt: skip
            cost = Cost(n, r, p)
            if cost.bearable:
                key, own_check = _derive(passphrase(), salt, cost)
                if not hmac.compare_digest(own_check, check):
                    raise PassphraseError("this is not the passphrase of the backup")
                return _Cipher(head, key)
    raise ProtocolError(
        f"the backup is encrypted in a way that is not known here ({values.get('cipher')!r:.40})",
        hint="it was made by another version of pmgsync, or its first bytes are damaged",
    )


def _read_head(read: Read) -> tuple[bytes, dict[str, Any]]:
    no_backup = "this file is not a backup of pmgcm"
    if _up_to(read, len(MAGIC)) != MAGIC:
        raise ProtocolError(no_backup)
    version = _exactly(read, 1, 0)[0]
    if version != VERSION:
        raise ProtocolError(
            f"the backup has version {version} of the format, this pmgcm knows {VERSION}",
            hint="take a pmgcm of the version that made it, or a later one",
        )
    size = _exactly(read, 4, 0)
    length = int.from_bytes(size, "big")
    if length > MAX_HEAD_BYTES:
        raise _damaged(0)
    packed = _exactly(read, length, 0)
    try:
        values = msgpack.unpackb(packed, raw=False, max_ext_len=0)
    except Exception as error:  # msgpack raises ValueError and its own types
        raise _damaged(0) from error
    if not isinstance(values, dict) or "cipher" not in values:
        raise _damaged(0)
    return MAGIC + bytes([version]) + size + packed, values


def _head(values: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(values, use_bin_type=True)
    return MAGIC + bytes([VERSION]) + len(packed).to_bytes(4, "big") + packed


def _framed(chunk: bytes, *, last: bool) -> bytes:
    return (len(chunk) | (_LAST if last else 0)).to_bytes(4, "big") + chunk


def _derive(passphrase: bytes, salt: bytes, cost: Cost) -> tuple[bytes, bytes]:
    """Return the key, and what tells a wrong passphrase from a damaged file; neither says anything of the other."""
    derived = Scrypt(salt=salt, length=KEY_BYTES + CHECK_BYTES, n=cost.n, r=cost.r, p=cost.p).derive(passphrase)
    return derived[:KEY_BYTES], derived[KEY_BYTES:]


def _up_to(read: Read, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := read(size - len(found))):
        found += more
    return found


def _exactly(read: Read, size: int, number: int) -> bytes:
    found = _up_to(read, size)
    if len(found) < size:
        raise DamagedFileError(
            f"the backup ends in the middle, in chunk {number + 1}", hint="it was not copied whole; take another copy"
        )
    return found


def _damaged(number: int) -> DamagedFileError:
    return DamagedFileError(f"the backup is damaged in chunk {number + 1}", hint="take another copy of it")
