"""The join door: the one socket that strangers may connect to. It answers `check` and `admit`, on the master only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import zmq

from broker.cluster.tokens import Tokens
from broker.members.calls import End
from broker.net.port import Port
from pmgsync.core.membership import ClusterDocument, Member, SignedDocument, with_member
from pmgsync.errors import MembershipError, PmgsyncError, ProtocolError, UnknownOperationError
from pmgsync.wire.messages import Message, error_map, pack, unpack

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1


class Cluster(Protocol):
    """What the door needs of the cluster behind it."""

    def master_document(self) -> ClusterDocument:
        """Return the cluster document; raises MembershipError when this node is not the master."""

    def ask_facts(self, caller: End) -> None:
        """Have this node's agent tell what its database is like; raises UnreachableError when there is no agent."""

    def change_document(self, document: ClusterDocument) -> SignedDocument:
        """Sign, store and spread a new cluster document."""


class Door:
    """Answers on the join port, a ROUTER under CURVE that takes any client key."""

    def __init__(self, port: Port, tokens: Tokens, cluster: Cluster) -> None:
        self._port = port
        self._tokens = tokens
        self._cluster = cluster

    def receive(self, parts: list[zmq.Frame]) -> None:
        """Take a message with the sender's identity in front."""
        identity, client_key = parts[0].bytes, bytes.fromhex(str(parts[-1].get("User-Id")))
        request = 0
        try:
            if len(parts) != 2:
                raise ProtocolError("a join request is one map")
            message = unpack(parts[1].bytes)
            request = message["id"] if type(message.get("id")) is int else 0
            if message["op"] == "check":
                self._check(identity, request, message)
            elif message["op"] == "admit":
                self._admit(identity, request, message, client_key)
            else:
                raise UnknownOperationError(f"the join door does not know {message['op']!r:.40}")
        except PmgsyncError as error:
            log.warning("action=join-refused reason=%s", error.message)
            self._send(identity, error_map(request, error))

    def _check(self, identity: bytes, request: int, message: Message) -> None:
        document = self._cluster.master_document()
        self._tokens.check(str(message.get("token", "")))

        def answer(reply: Mapping[str, Any], attachments: Sequence[bytes]) -> bool:
            if reply["op"] == "done":
                facts = {
                    **reply.get("result", {}),
                    "op": "facts",
                    "id": request,
                    "protocol": PROTOCOL_VERSION,
                    "cluster": document.name,
                    "profile": document.profile,
                    "level": _level(document),
                    "members": [[member.cid, member.name, member.address] for member in document.members],
                }
                return self._send(identity, facts)
            return self._send(identity, reply) if reply["op"] == "error" else True

        self._cluster.ask_facts(End(("door", identity), answer, request))

    def _admit(self, identity: bytes, request: int, message: Message, client_key: bytes) -> None:
        document = self._cluster.master_document()
        token = str(message.get("token", ""))
        # First: to whoever has no token the door does not tell which names, addresses and keys are members'.
        self._tokens.check(token)
        newcomer = _newcomer(message, client_key)
        known = document.by_key(newcomer.curve_key)
        if known is not None and (known.name, known.address) != (newcomer.name, newcomer.address):
            raise MembershipError(
                f"this node's key belongs to member {known.name} ({known.cid}) already",
                hint=f"run `pmgcm delete {known.cid}` on the master first",
            )
        if known is not None and known.cid == document.master:
            raise MembershipError("this node is the cluster's master")
        changed = document if known is not None else with_member(document, newcomer)
        self._tokens.use(token)
        signed = self._cluster.change_document(changed)
        member = signed.document.by_key(newcomer.curve_key)
        assert member is not None
        log.info("action=admitted cid=%d name=%s address=%s", member.cid, member.name, member.address)
        self._send(identity, {"op": "admitted", "id": request, "cid": member.cid}, signed.pack())

    def _send(self, identity: bytes, message: Mapping[str, Any], *attachments: bytes) -> bool:
        return self._port.send([identity, pack(message), *attachments])


def _level(document: ClusterDocument) -> str:
    """Return the master's subscription level, which the others' is to be."""
    master = document.member(document.master)
    return master.level if master is not None else ""


def _newcomer(message: Message, client_key: bytes) -> Member:
    """Return the member an `admit` asks for; its CURVE key must be the one that it speaks with."""
    if message.get("version") != PROTOCOL_VERSION:
        raise MembershipError(
            f"the node speaks protocol version {message.get('version')!r:.20}, the cluster version {PROTOCOL_VERSION}",
            hint="install the same version of pmgsync on all nodes",
        )
    keys = {name: message.get(name) for name in ("curve_key", "sign_key")}
    if not all(isinstance(key, bytes) and len(key) == 32 for key in keys.values()):
        raise ProtocolError("a join request's keys are not 32 bytes each")
    if keys["curve_key"] != client_key:
        raise MembershipError("the key in the join request is not the key of the connection it came over")
    return Member.from_map(
        {
            **{name: message.get(name) for name in ("name", "address", "events", "control", "join")},
            **{name: bytes(key or b"").hex() for name, key in keys.items()},
            "cid": 1,
            "role": "node",
            "level": str(message.get("level", ""))[:64],
            "host_keys": message.get("host_keys", {}),
        }
    )
