"""Join tokens: one-time, short-lived, and kept in memory only.

A used token stays good for the key that has used it, until it expires: the same line takes up a join that was
interrupted. A node with a wrong token is not told what is wrong with it; the log says that.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pmgsync.errors import MembershipError

TOKEN_BYTES = 16
MAX_TTL_S = 7 * 86_400.0
MAX_TOKENS = 100


@dataclass(slots=True)
class _Token:
    expiry: float
    used_by: bytes | None = None


class Tokens:
    """The tokens that this broker has given out; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: dict[bytes, _Token] = {}

    def issue(self, ttl_s: float, *, key: bytes | None = None) -> str:
        """Return a new token that is good for `ttl_s` seconds.

        Args:
            key: the only CURVE public key that may use it, None for whoever comes first.

        Raises:
            MembershipError: when the time is out of range or too many tokens are open.
        """
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise MembershipError(f"a token can live for 1 s to {MAX_TTL_S:.0f} s, not {ttl_s:g} s")
        now = self._clock()
        self._tokens = {digest: token for digest, token in self._tokens.items() if token.expiry > now}
        if len(self._tokens) >= MAX_TOKENS:
            raise MembershipError(f"{MAX_TOKENS} tokens are open already", hint="wait until some have expired")
        token = base64.b32encode(secrets.token_bytes(TOKEN_BYTES)).decode().rstrip("=")
        self._tokens[_digest(token)] = _Token(now + ttl_s, key)
        return token

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
        """Bind a good token to the key of the node that has used it."""
        self._tokens[_digest(token)].used_by = key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.strip().upper().encode("utf-8", "replace")).digest()
