"""Members: a node of the cluster as the others know it, and its fingerprint as a person reads it. Pure values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pmgsync.core.cluster_conf import HOST_KEYS
from pmgsync.errors import MembershipError, ProtocolError

MAX_CID = 2**31 - 1
KEY_BYTES = 32
ROLES = frozenset({"master", "node", "witness"})
STATES = frozenset({"member", "joining"})

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
_HOST_KEY = re.compile(r"[0-9A-Za-z+/=:]{1,2000}")
_ADDRESS = re.compile(r"[0-9A-Za-z.:%_-]{1,255}")


def format_fingerprint(key: bytes) -> str:
    """Return a CURVE public key as the administrator sees it: 64 hexadecimal digits in pairs with colons."""
    return key.hex(":").upper()


def parse_fingerprint(text: str) -> bytes:
    """Return the key behind a fingerprint; colons and the case of the digits do not matter.

    Raises:
        MembershipError: when it is not 64 hexadecimal digits.
    """
    digits = text.replace(":", "").strip()
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
        raise MembershipError(
            f"{text!r:.100} is not a fingerprint, expected 64 hexadecimal digits",
            hint="copy the whole line that `pmgcm join-cmd` prints on the master",
        )
    return bytes.fromhex(digits)


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the cluster, as the others know it.

    Attributes:
        role: `master`, `node` (a slave), or `witness`: a broker without a database, that votes and is never master.
        state: `joining` until the node has said that its copy is complete; it holds no vote so long. Then `member`.
        level: of the subscription, as the node said it.
        host_keys: names and values of `HOST_KEYS`, for the gateway's own daemons.
    """

    cid: int
    name: str
    address: str
    events: int
    control: int
    join: int
    curve_key: bytes
    sign_key: bytes
    role: str = "node"
    level: str = ""
    state: str = "member"
    host_keys: tuple[tuple[str, str], ...] = ()

    @property
    def votes(self) -> bool:
        """True when its vote and its acknowledgements count for a majority."""
        return self.state == "member"

    @property
    def may_be_master(self) -> bool:
        return self.votes and self.role != "witness"

    def to_map(self) -> dict[str, Any]:
        return {
            "cid": self.cid,
            "name": self.name,
            "address": self.address,
            "events": self.events,
            "control": self.control,
            "join": self.join,
            "curve_key": self.curve_key.hex(),
            "sign_key": self.sign_key.hex(),
            "role": self.role,
            "level": self.level,
            "state": self.state,
            "host_keys": dict(self.host_keys),
        }

    @classmethod
    def from_map(cls, data: Mapping[str, Any]) -> Member:
        """Return the member a map describes.

        Raises:
            ProtocolError: when a value is missing or not what PROTOCOL.md, section 7, says.
        """

        def take(key: str, good: Callable[[Any], bool]) -> Any:
            value = data.get(key)
            if not good(value):
                raise ProtocolError(f"a member's {key} is {value!r:.80}")
            return value

        def a_port(value: Any) -> bool:
            return type(value) is int and 0 < value < 65536

        def a_key(value: Any) -> bool:
            return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None

        def a_host(value: Any) -> bool:
            return isinstance(value, dict) and all(
                key in HOST_KEYS and isinstance(text, str) and _HOST_KEY.fullmatch(text) is not None
                for key, text in value.items()
            )

        return cls(
            take("cid", lambda value: type(value) is int and 0 < value <= MAX_CID),
            take("name", lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None),
            take("address", lambda value: isinstance(value, str) and _ADDRESS.fullmatch(value) is not None),
            take("events", a_port),
            take("control", a_port),
            take("join", a_port),
            bytes.fromhex(take("curve_key", a_key)),
            bytes.fromhex(take("sign_key", a_key)),
            take("role", lambda value: isinstance(value, str) and value in ROLES),
            take("level", lambda value: isinstance(value, str) and len(value) <= 64),
            take("state", lambda value: isinstance(value, str) and value in STATES) if "state" in data else "member",
            tuple(sorted(take("host_keys", a_host).items())) if "host_keys" in data else (),
        )
