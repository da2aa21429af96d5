"""The join door: the one socket that strangers may connect to. It answers `check` and `admit`, on the master only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import zmq

from broker.cluster.attempts import Attempts
from broker.cluster.password import PasswordCheck
from broker.cluster.tokens import Tokens
from broker.members.calls import Attachments, End
from broker.net.incoming import plain_address
from broker.net.loop import Loop
from broker.net.port import Port
from broker.net.refusals import Refusals
from pmgsync.core.membership import ClusterDocument, Member, SignedDocument, with_member, without_member
from pmgsync.errors import (
    MembershipError,
    PmgsyncError,
    ProtocolError,
    TokenRefusedError,
    UnknownOperationError,
    UnreachableError,
)
from pmgsync.wire.messages import Message, error_map, pack, unpack

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
AGENT_S = 8.0
"""For so long a newcomer's question waits for this node's agent: less than the newcomer waits for the answer."""
AGENT_AGAIN_S = 0.2
PROVED_S = 3600.0
"""For so long a password that was right need not be given again by the same node."""


class Cluster(Protocol):
    """What the door needs of the cluster behind it."""

    def master_document(self) -> ClusterDocument:
        """Return the cluster document; raises MembershipError when this node is not the master."""

    def ask_facts(self, caller: End) -> None:
        """Have this node's agent tell what its database is like; raises UnreachableError when there is no agent."""

    def change_document(self, document: ClusterDocument) -> SignedDocument:
        """Sign, store and spread a new cluster document."""

    def when_kept(self, done: Callable[[PmgsyncError | None], None]) -> None:
        """Call `done` when no vote can lose the document in force any more, or with an error when that takes long."""


@dataclass(frozen=True, slots=True)
class _Caller:
    """Whoever has sent a request: its connection, CURVE public key, address, and the request's id."""

    identity: bytes
    key: bytes
    address: str
    request: int


class Door:
    """Answers on the join port, a ROUTER under CURVE that takes any client key."""

    def __init__(
        self,
        port: Port,
        loop: Loop,
        tokens: Tokens,
        attempts: Attempts,
        passwords: PasswordCheck,
        refusals: Refusals,
        cluster: Cluster,
    ) -> None:
        self._port = port
        self._loop = loop
        self._tokens = tokens
        self._attempts = attempts
        self._passwords = passwords
        self._refusals = refusals
        self._cluster = cluster

    def receive(self, parts: list[zmq.Frame]) -> None:
        """Take a message with the sender's identity in front."""
        last = parts[-1]
        caller = _Caller(
            parts[0].bytes, bytes.fromhex(str(last.get("User-Id"))), plain_address(str(last.get("Peer-Address"))), 0
        )
        try:
            if len(parts) != 2:
                raise ProtocolError("a join request is one map")
            message = unpack(parts[1].bytes)
            caller = replace(caller, request=message["id"] if type(message.get("id")) is int else 0)
            self._handle(caller, message)
        except PmgsyncError as error:
            self._refuse(caller, error)

    def _handle(self, caller: _Caller, message: Message) -> None:
        match message["op"]:
            case "check":
                self._prove(caller, message, lambda token: self._check(caller, message, token))
            case "admit":
                self._prove(caller, message, lambda token: self._admit_when_kept(caller, message, token))
            case other:
                raise UnknownOperationError(f"the join door does not know {other!r:.40}")

    def _refuse(self, caller: _Caller, error: PmgsyncError) -> None:
        self._refusals.note("join", caller.address, error.message)
        self._send(caller, error_map(caller.request, error))

    # -- who may come in ----------------------------------------------------------------------------------------------

    def _prove(self, caller: _Caller, message: Message, then: Callable[[str], None]) -> None:
        """Call `then` with a token once the caller has proved that it may join; the proof is checked before all else.

        A node that is joining has proved it before: its key says who it is.
        """
        document = self._cluster.master_document()
        known = document.by_key(caller.key)
        if known is not None and known.state == "joining":
            then("")
            return
        self._attempts.check(caller.address)
        password = message.get("password")
        if isinstance(password, str):
            self._passwords.start(password, lambda good: self._judged(caller, good, then))
            return
        token = str(message.get("token", ""))
        problem = self._tokens.problem(token, caller.key)
        if problem:
            self._wrong(caller, f"its token is {problem}")
        else:
            then(token)

    def _judged(self, caller: _Caller, good: bool, then: Callable[[str], None]) -> None:
        """Go on after a password was checked: a token that only this caller can use stands for it from now on."""
        if not good:
            self._wrong(caller, "its password is wrong")
            return
        try:
            then(self._tokens.issue(PROVED_S, key=caller.key))
        except PmgsyncError as error:
            self._refuse(caller, error)

    def _wrong(self, caller: _Caller, reason: str) -> None:
        delay_s = self._attempts.wrong(caller.address)
        log.warning("action=join-attempt address=%s reason=%s delay_s=%.1f", caller.address, reason, delay_s)
        error = TokenRefusedError(
            "the master does not accept this token or password",
            hint="run `pmgcm join-cmd` on the master for a new token, or give the password of its root user",
        )

        def answer() -> None:
            self._send(caller, error_map(caller.request, error))

        self._loop.once(delay_s, answer)

    # -- what is answered ---------------------------------------------------------------------------------------------

    def _check(self, caller: _Caller, message: Message, token: str) -> None:
        document = self._cluster.master_document()
        problem = _place_problem(document, message, caller.key)

        def answer(reply: Mapping[str, Any], attachments: Attachments) -> bool:
            if reply["op"] == "done":
                facts = {
                    **reply.get("result", {}),
                    "op": "facts",
                    "id": caller.request,
                    "token": token,
                    "protocol": PROTOCOL_VERSION,
                    "cluster": document.name,
                    "profile": document.profile,
                    "level": _level(document),
                    "place_problem": problem.message if problem else "",
                    "place_hint": problem.hint if problem else "",
                    "members": [[member.cid, member.name, member.address] for member in document.members],
                }
                return self._send(caller, facts)
            if reply["op"] == "error" and reply.get("error") == UnreachableError.code and time.monotonic() < deadline:
                # The worker that was asked ended, or was given up for being silent.
                self._loop.once(AGENT_AGAIN_S, lambda: self._ask_facts(caller, end, deadline))
                return True
            return self._send(caller, reply) if reply["op"] == "error" else True

        deadline = time.monotonic() + AGENT_S
        end = End(("door", caller.identity), answer, caller.request)
        self._ask_facts(caller, end, deadline)

    def _ask_facts(self, caller: _Caller, end: End, deadline: float) -> None:
        """Ask the agent, which a master that was made or started just now may not have yet."""
        try:
            self._cluster.ask_facts(end)
        except UnreachableError as error:
            if time.monotonic() > deadline:
                self._refuse(caller, error)
            else:
                self._loop.once(AGENT_AGAIN_S, lambda: self._ask_facts(caller, end, deadline))

    def _admit_when_kept(self, caller: _Caller, message: Message, token: str) -> None:
        """Admit a newcomer once the last change of the cluster cannot be lost any more; one change at a time."""

        def admit(error: PmgsyncError | None) -> None:
            try:
                if error is not None:
                    raise error
                self._admit(caller, message, token)
            except PmgsyncError as refusal:
                self._refuse(caller, refusal)

        self._cluster.when_kept(admit)

    def _admit(self, caller: _Caller, message: Message, token: str) -> None:
        document = self._cluster.master_document()
        newcomer = _newcomer(message, caller.key)
        known = document.by_key(newcomer.curve_key)
        if token and known is None and (problem := self._tokens.problem(token, caller.key)):
            # It was good when it was shown; another node has used it since, or its time is over.
            self._wrong(caller, f"its token is {problem}")
            return
        if known is not None and known.cid == document.master:
            raise MembershipError("this node is the cluster's master")
        if known is not None and known.state != "joining":
            raise MembershipError(
                f"this node's key belongs to member {known.name} ({known.cid}) already",
                hint=f"run `pmgcm delete {known.cid}` on the master first",
            )
        if known is not None and (known.name, known.address) != (newcomer.name, newcomer.address):
            # It began to join under another name or address; that entry is replaced.
            document, known = without_member(document, known.cid), None
        changed = document if known is not None else with_member(document, newcomer)
        if token and known is None:
            self._tokens.use(token, caller.key)
        signed = self._cluster.change_document(changed)
        member = signed.document.by_key(newcomer.curve_key)
        assert member is not None
        log.info("action=admitted cid=%d name=%s address=%s", member.cid, member.name, member.address)
        cid = member.cid

        def answer(error: PmgsyncError | None) -> None:
            if error is not None:
                self._refuse(caller, error)
            else:
                self._send(caller, {"op": "admitted", "id": caller.request, "cid": cid}, signed.pack())

        # Before that another master could give the same CID to another node.
        self._cluster.when_kept(answer)

    def _send(self, caller: _Caller, message: Mapping[str, Any], *attachments: bytes) -> bool:
        return self._port.send([caller.identity, pack(message), *attachments])


def _level(document: ClusterDocument) -> str:
    """Return the master's subscription level; the others must have the same."""
    master = document.member(document.master)
    return master.level if master is not None else ""


def _place_problem(document: ClusterDocument, message: Message, key: bytes) -> PmgsyncError | None:
    """Return why a node could not be admitted as what it says it is; None when it could, or does not say."""
    known = document.by_key(key)
    if "name" not in message or (known is not None and known.state == "joining"):
        return None
    try:
        with_member(document, _newcomer(message, key))
    except PmgsyncError as error:
        return error
    return None


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
            "role": "witness" if message.get("role") == "witness" else "node",
            "state": "joining",
            "level": str(message.get("level", ""))[:64],
            "host_keys": message.get("host_keys", {}),
        }
    )
