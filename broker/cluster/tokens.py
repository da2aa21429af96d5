"""Join tokens: one-time, short-lived. Their digests are on disk, so that a restart of the broker makes none void.

A used token stays good for the key that has used it, until its node is a member or it expires: the same line takes up
a join that was interrupted. A node with a wrong token is not told what is wrong with it; the log says that.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgpack

from pmgsync.errors import MembershipError, PmgsyncError

log = logging.getLogger(__name__)

TOKEN_BYTES = 16
MAX_TTL_S = 7 * 86_400.0
MAX_TOKENS = 100
VERSION = 1


@dataclass(slots=True)
class _Token:
    expiry: float
    used_by: bytes | None = None


class Disk(Protocol):
    """Where the digests are kept."""

    def tokens(self) -> bytes | None:
        """Return what was stored last, None when nothing was; raises ConfigError when it cannot be read."""

    def store_tokens(self, data: bytes) -> None:
        """Replace it; raises ConfigError when it cannot be written."""


class Tokens:
    """The tokens that this broker has given out, and those before it on the same disk."""

    def __init__(
        self, clock: Callable[[], float], disk: Disk | None = None, *, wall: Callable[[], float] = time.time
    ) -> None:
        """Begin.

        Args:
            clock: a monotonic clock in seconds.
            wall: the clock that goes on while the broker does not run. One that is set back then makes a token last no
                longer than it had left.
        """
        self._clock = clock
        self._disk = disk
        self._wall = wall
        self._tokens: dict[bytes, _Token] = {}
        self._load()

    def _load(self) -> None:
        try:
            data = self._disk.tokens() if self._disk is not None else None
            if data is None:
                return
            now, (version, stored, tokens) = self._clock(), msgpack.unpackb(data)
            if version != VERSION:
                raise ValueError(f"version {version!r:.20}")
            away = max(0.0, self._wall() - float(stored))
            for digest, left_s, used_by in tokens:
                self._tokens[bytes(digest)] = _Token(now + min(float(left_s), MAX_TTL_S) - away, used_by)
        except (PmgsyncError, ValueError, TypeError, msgpack.UnpackException) as error:
            log.warning("action=tokens-unreadable error=%s", error)  # they are void, and new ones are made

    def _store(self) -> None:
        if self._disk is not None:
            now = self._clock()
            tokens = [[digest, one.expiry - now, one.used_by] for digest, one in self._tokens.items()]
            self._disk.store_tokens(msgpack.packb([VERSION, self._wall(), tokens]))

    def issue(self, ttl_s: float, *, key: bytes | None = None) -> str:
        """Return a new token that is good for `ttl_s` seconds.

        Args:
            key: the only CURVE public key that may use it, None for whoever comes first.

        Raises:
            MembershipError: when the time is out of range or too many tokens are open.
            ConfigError: when it cannot be noted on disk.
        """
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise MembershipError(f"a token can live for 1 s to {MAX_TTL_S:.0f} s, not {ttl_s:g} s")
        now = self._clock()
        self._tokens = {digest: token for digest, token in self._tokens.items() if token.expiry > now}
        if len(self._tokens) >= MAX_TOKENS:
            self._forget_used()
        if len(self._tokens) >= MAX_TOKENS:
            raise MembershipError(f"{MAX_TOKENS} tokens are open already", hint="wait until some have expired")
        token = base64.b32encode(secrets.token_bytes(TOKEN_BYTES)).decode().rstrip("=")
        self._tokens[_digest(token)] = _Token(now + ttl_s, key)
        self._store()
        return token

    def _forget_used(self) -> None:
        """Forget the token that somebody has used and that expires first: whoever has, mostly has joined by now."""
        used = [(token.expiry, digest) for digest, token in self._tokens.items() if token.used_by is not None]
        if used:
            del self._tokens[min(used)[1]]

    def problem(self, token: str, key: bytes) -> str:
        """Return what is wrong with a token that a node presents, "" when it is good. For the log only."""
        digest = _digest(token)
        found = next((known for digest_, known in self._tokens.items() if hmac.compare_digest(digest_, digest)), None)
        if found is None:
            return "unknown or long expired"
        if found.expiry <= self._clock():
            return "expired"
        return "used by another node" if found.used_by not in {None, key} else ""

    def use(self, token: str, key: bytes) -> None:
        """Bind a good token to the key of the node that has used it.

        Raises:
            ConfigError: when it cannot be noted on disk.
        """
        self._tokens[_digest(token)].used_by = key
        self._store()

    def forget(self, key: bytes) -> None:
        """End the tokens that a node has used: it is a member now, or is to be one no more."""
        kept = {digest: token for digest, token in self._tokens.items() if token.used_by != key}
        if len(kept) < len(self._tokens):
            self._tokens = kept
            try:
                self._store()
            except PmgsyncError as error:
                log.warning("action=tokens-not-stored error=%s", error)  # they are void until the broker is restarted


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.strip().upper().encode("utf-8", "replace")).digest()
