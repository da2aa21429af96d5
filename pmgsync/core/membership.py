"""The cluster document: who is a member, who is master, in which epoch; signed by the member that changed it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pmgsync.errors import MembershipError, ProtocolError

MAX_MEMBERS = 64
MAX_DOCUMENT = 1 << 20
"""Bytes of a signed document."""
MAX_CID = 2**31 - 1
KEY_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
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
    """A node of the cluster, as the others know it."""

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

        return cls(
            take("cid", lambda value: type(value) is int and 0 < value <= MAX_CID),
            take("name", lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None),
            take("address", lambda value: isinstance(value, str) and _ADDRESS.fullmatch(value) is not None),
            take("events", a_port),
            take("control", a_port),
            take("join", a_port),
            bytes.fromhex(take("curve_key", a_key)),
            bytes.fromhex(take("sign_key", a_key)),
            take("role", lambda value: value in {"master", "node"}),
            take("level", lambda value: isinstance(value, str) and len(value) <= 64),
        )


@dataclass(frozen=True, slots=True)
class ClusterDocument:
    """The cluster as all members agree on it; a change makes a new one with a greater (epoch, serial)."""

    cluster: bytes
    name: str
    profile: str
    epoch: int
    serial: int
    master: int
    max_cid: int
    members: tuple[Member, ...]
    history: tuple[Mapping[str, Any], ...]

    @property
    def version(self) -> tuple[int, int]:
        return self.epoch, self.serial

    def member(self, cid: int) -> Member | None:
        """Return the member with this CID."""
        return next((member for member in self.members if member.cid == cid), None)

    def by_key(self, curve_key: bytes) -> Member | None:
        """Return the member with this CURVE public key."""
        return next((member for member in self.members if member.curve_key == curve_key), None)

    @property
    def cids(self) -> frozenset[int]:
        return frozenset(member.cid for member in self.members)

    def to_json(self) -> bytes:
        """Return the bytes that are signed."""
        body = {
            "cluster": self.cluster.hex(),
            "name": self.name,
            "profile": self.profile,
            "epoch": self.epoch,
            "serial": self.serial,
            "master": self.master,
            "max_cid": self.max_cid,
            "members": [member.to_map() for member in self.members],
            "history": [dict(entry) for entry in self.history],
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, body: bytes) -> ClusterDocument:
        """Return the document in JSON text.

        Raises:
            ProtocolError: when it is not a document that PROTOCOL.md, section 7, allows.
        """
        try:
            data = json.loads(body)
            cluster = bytes.fromhex(data["cluster"])
            members = tuple(Member.from_map(entry) for entry in data["members"])
            history = tuple(data["history"])
            epoch, serial, master, max_cid = numbers = [data["epoch"], data["serial"], data["master"], data["max_cid"]]
            name, profile = data["name"], data["profile"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"a cluster document cannot be read ({type(error).__name__}: {error})") from error
        if not all(type(number) is int and 0 < number < 2**62 for number in numbers):
            raise ProtocolError("a cluster document's epoch, serial, master and max_cid are not positive integers")
        if len(cluster) != 16 or not (isinstance(name, str) and isinstance(profile, str)):
            raise ProtocolError("a cluster document's id, name or profile is malformed")
        if not all(isinstance(entry, dict) for entry in history):
            raise ProtocolError("a cluster document's history is not a list of maps")
        document = cls(cluster, name, profile, epoch, serial, master, max_cid, members, history)
        document._check()
        return document

    def _check(self) -> None:
        if not 0 < len(self.members) <= MAX_MEMBERS:
            raise ProtocolError(f"a cluster document has {len(self.members)} members, expected 1 to {MAX_MEMBERS}")
        for what, values in (
            ("CID", [member.cid for member in self.members]),
            ("name", [member.name for member in self.members]),
            ("key", [member.curve_key for member in self.members]),
            ("address", [(member.address, member.control) for member in self.members]),
        ):
            if len(set(values)) != len(values):
                raise ProtocolError(f"a cluster document has two members with one {what}")
        if self.max_cid < max(self.cids):
            raise ProtocolError("a cluster document's max_cid is below a member's CID")
        if [member.cid for member in self.members if member.role == "master"] != [self.master]:
            raise ProtocolError("a cluster document's master is not its one member with the role master")


def no_cluster() -> MembershipError:
    """Return the error of a node that is in no cluster."""
    return MembershipError("no cluster defined", hint="run `pmgcm create`, or `pmgcm join` to join an existing cluster")


def require_master(document: ClusterDocument, cid: int) -> ClusterDocument:
    """Return the document when the node `cid` is its master.

    Raises:
        MembershipError: when it is not; the hint says where the master is.
    """
    if document.master != cid:
        master = document.member(document.master)
        raise MembershipError(
            "operation not permitted (not master)",
            hint=f"run it on {master.name} ({master.address})" if master else "",
        )
    return document


def found_cluster(cluster: bytes, name: str, profile: str, founder: Member) -> ClusterDocument:
    """Return the first document of a cluster, of one member who is master."""
    return ClusterDocument(
        cluster,
        name,
        profile,
        1,
        1,
        founder.cid,
        founder.cid,
        (replace(founder, role="master"),),
        ({"epoch": 1, "master": founder.cid, "fork": None},),
    )


def with_member(document: ClusterDocument, newcomer: Member) -> ClusterDocument:
    """Return the document with one more member, who gets the next CID that was never used.

    Raises:
        MembershipError: when name, address or key belong to a member already, or the cluster is full.
    """
    for member in document.members:
        if member.curve_key == newcomer.curve_key:
            raise MembershipError(
                f"this node's key belongs to member {member.name} ({member.cid}) already",
                hint=f"run `pmgcm delete {member.cid}` on the master first",
            )
        if member.name == newcomer.name:
            raise MembershipError(
                f"a member is called {member.name} already (CID {member.cid})",
                hint=f"give the node another name, or run `pmgcm delete {member.cid}` on the master first",
            )
        if member.address == newcomer.address and {member.events, member.control, member.join} & {
            newcomer.events,
            newcomer.control,
            newcomer.join,
        }:
            raise MembershipError(
                f"address {member.address} and its ports belong to member {member.name} ({member.cid}) already",
                hint=f"run `pmgcm delete {member.cid}` on the master first",
            )
    if len(document.members) >= MAX_MEMBERS:
        raise MembershipError(f"the cluster has {MAX_MEMBERS} members, which is the most it can have")
    cid = document.max_cid + 1
    member = replace(newcomer, cid=cid, role="node")
    return replace(document, serial=document.serial + 1, max_cid=cid, members=(*document.members, member))


def without_member(document: ClusterDocument, cid: int) -> ClusterDocument:
    """Return the document without a member.

    Raises:
        MembershipError: when there is no such member, or it is the master.
    """
    if document.member(cid) is None:
        raise MembershipError(f"no member has CID {cid}", hint="`pmgcm status` lists the members")
    if cid == document.master:
        raise MembershipError("unable to delete master node", hint="promote another node first")
    members = tuple(member for member in document.members if member.cid != cid)
    return replace(document, serial=document.serial + 1, members=members)


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A document with the bytes that were signed, the signer and the signature."""

    document: ClusterDocument
    body: bytes
    signer: int
    signature: bytes

    def pack(self) -> bytes:
        """Return the form that travels and is stored."""
        return msgpack.packb([self.body, self.signer, self.signature], use_bin_type=True)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> SignedDocument:
        """Return a signed document; its signature is not looked at here.

        Raises:
            ProtocolError: when it is malformed.
        """
        if len(data) > MAX_DOCUMENT:
            raise ProtocolError(f"a cluster document has {len(data)} bytes, expected at most {MAX_DOCUMENT}")
        try:
            body, signer, signature = msgpack.unpackb(data, raw=False, max_ext_len=0)
        except Exception as error:  # msgpack raises ValueError and its own types
            raise ProtocolError(f"a cluster document is malformed ({error})") from error
        if type(body) is not bytes or type(signer) is not int or type(signature) is not bytes:
            raise ProtocolError("a cluster document is not a body, a signer and a signature")
        return cls(ClusterDocument.from_json(body), body, signer, signature)

    def verify(self, keys: ClusterDocument) -> None:
        """Check the signature with the signer's key in a document that is trusted.

        Raises:
            MembershipError: when the signer is not a member there, or the signature does not hold.
        """
        signer = keys.member(self.signer)
        if signer is None:
            raise MembershipError(f"a cluster document is signed by CID {self.signer}, who is not a member")
        try:
            Ed25519PublicKey.from_public_bytes(signer.sign_key).verify(self.signature, self.body)
        except (InvalidSignature, ValueError) as error:
            raise MembershipError(
                f"the signature of {signer.name} ({signer.cid}) on a cluster document is wrong"
            ) from error


def sign(document: ClusterDocument, signer: int, key: Ed25519PrivateKey) -> SignedDocument:
    """Return the document, signed by a member."""
    body = document.to_json()
    return SignedDocument(document, body, signer, key.sign(body))


def accept_document(held: ClusterDocument, offered: SignedDocument) -> bool:
    """Say whether an offered document replaces the one held.

    Returns:
        True when it is newer, False when it is the same or older.

    Raises:
        MembershipError: when it is newer but of another cluster, not signed by a member, or forgets what may not be
            forgotten.
    """
    new = offered.document
    if new.version <= held.version:
        return False
    if new.cluster != held.cluster:
        raise MembershipError("a cluster document of another cluster was offered")
    offered.verify(held)
    if new.max_cid < held.max_cid or tuple(new.history[: len(held.history)]) != held.history:
        raise MembershipError("a cluster document that forgets CIDs or epochs was offered")
    return True
