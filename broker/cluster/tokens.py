"""Join tokens: one-time, short-lived, kept in memory only, and guessing at them is slowed down."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections import deque
from collections.abc import Callable

from pmgsync.errors import MembershipError, TokenExpiredError, TokenRefusedError, TooManyAttemptsError

TOKEN_BYTES = 16
MAX_TTL_S = 7 * 86_400.0
MAX_TOKENS = 100
MAX_WRONG = 10
WRONG_WINDOW_S = 60.0
REMEMBER_S = 86_400.0
"""How long a used or expired token is told apart from one that never was."""


class Tokens:
    """The tokens that this broker has given out; `clock` is a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._expiry: dict[bytes, float] = {}
        self._used: set[bytes] = set()
        self._wrong: deque[float] = deque(maxlen=MAX_WRONG)

    def issue(self, ttl_s: float) -> str:
        """Return a new token that is good for `ttl_s` seconds.

        Raises:
            MembershipError: when the time is out of range or too many tokens are open.
        """
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise MembershipError(f"a token can live for 1 s to {MAX_TTL_S:.0f} s, not {ttl_s:g} s")
        now = self._clock()
        for digest in [digest for digest, expiry in self._expiry.items() if expiry + REMEMBER_S < now]:
            del self._expiry[digest]
            self._used.discard(digest)
        if sum(expiry > now for expiry in self._expiry.values()) >= MAX_TOKENS:
            raise MembershipError(f"{MAX_TOKENS} tokens are open already", hint="wait until some have expired")
        token = base64.b32encode(secrets.token_bytes(TOKEN_BYTES)).decode().rstrip("=")
        self._expiry[_digest(token)] = now + ttl_s
        return token

    def check(self, token: str) -> None:
        """Check a token without using it up.

        Raises:
            TokenRefusedError: when it is not good, or too many wrong ones were tried.
        """
        now = self._clock()
        while self._wrong and self._wrong[0] < now - WRONG_WINDOW_S:
            self._wrong.popleft()
        if len(self._wrong) >= MAX_WRONG:
            raise TooManyAttemptsError("too many wrong tokens were tried, the door is closed for a minute")
        digest = _digest(token)
        found = next((known for known in self._expiry if hmac.compare_digest(known, digest)), None)
        hint = "run `pmgcm join-cmd` on the master for a new one"
        if found is None:
            self._wrong.append(now)
            raise TokenRefusedError("the master does not know this token", hint=hint)
        if found in self._used:
            raise TokenExpiredError("this token has been used already", hint=hint)
        if self._expiry[found] <= now:
            raise TokenExpiredError("this token has expired", hint=hint)

    def use(self, token: str) -> None:
        """Check a token and use it up.

        Raises:
            TokenRefusedError: as `check`.
        """
        self.check(token)
        self._used.add(_digest(token))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.strip().upper().encode("utf-8", "replace")).digest()
