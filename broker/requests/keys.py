"""Changes of what a member shows of itself: its keys, its subscription level, the keys of its host.

The administrator asks his node, and it asks the master, who alone changes the document. The answer to a change of keys
is the document: it may come while the connection that was asked over is cut, for it was one of the old keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.cluster.documents import Documents
from broker.cluster.rekeying import Rekeying
from broker.leadership.asking import Answer
from broker.members.calls import Send
from broker.members.members import Members
from broker.net.keys import NodeKeys
from broker.requests.sessions import Session
from broker.requests.shared import number
from pmgsync.core.key_change import KeyChange
from pmgsync.core.membership import ClusterDocument, Member, SignedDocument, with_host, with_keys
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from, error_map

log = logging.getLogger(__name__)

Told = Callable[[SignedDocument], None]


class KeyRequests:
    """Serves `member.update`, from this machine and from members."""

    def __init__(
        self,
        cid: int,
        keys: NodeKeys,
        documents: Documents,
        rekeying: Rekeying,
        members: Members,
        *,
        ask: Callable[[int, Mapping[str, Any], Answer], bool],
        change_document: Callable[[ClusterDocument, Told], SignedDocument],
        offer_document: Callable[[int, bytes], None],
    ) -> None:
        """Begin.

        Args:
            ask: asks a member; False when it is not connected.
            change_document: signs and stores a new document, tells of it, and puts it in force.
            offer_document: takes the CID of a member and the packed document that it offers; raises PmgsyncError when
                it is not acceptable.
        """
        self._cid = cid
        self._keys = keys
        self._documents = documents
        self._rekeying = rekeying
        self._members = members
        self._ask = ask
        self._change_document = change_document
        self._offer_document = offer_document
        self._waiting: dict[bytes, tuple[Send, int]] = {}

    # -- from this machine --------------------------------------------------------------------------------------------

    def handle_local(self, session: Session, send: Send, message: Message) -> bool:
        """Handle a request of the command line; False when it is none of these.

        Raises:
            PmgsyncError: when it is refused.
        """
        if message["op"] != "member.update":
            return False
        document, request = self._documents.document, number(message, "id")
        shown = {name: message.get(name) for name in ("level", "host_keys")}
        wanted = _with_shown(document, self._cid, shown)
        keys = message.get("keys") is True
        if self._cid == document.master:
            if keys:
                self._refuse_alone(document)
                pair = self._rekeying.begin()
                wanted = with_keys(wanted, self._cid, pair.curve_public, pair.sign_public)
            self._change_document(wanted, lambda signed: None)
            send({"op": "done", "id": request, "result": {}}, ())
            return True
        question: dict[str, Any] = {"op": "member.update", **shown}
        if keys:
            pair = self._rekeying.begin()
            with_keys(wanted, self._cid, pair.curve_public, pair.sign_public)
            change = KeyChange(
                document.cluster, self._cid, self._keys.curve_public, pair.curve_public, pair.sign_public
            )
            question |= change.proof(self._keys.sign_private, pair.sign_private)

        def answer(reply: Message, attachments: Sequence[bytes]) -> None:
            self._answered(session.identity, document.master, reply, attachments, keys=keys)

        self._waiting[session.identity] = (send, request)
        if not self._ask(document.master, question, answer):
            del self._waiting[session.identity]
            raise UnreachableError("the master is not connected", hint="`pmgcm status` says more about it")
        return True

    def _refuse_alone(self, document: ClusterDocument) -> None:
        """Refuse to change the master's own keys while few hear of it: others could promote a node that had not."""
        here = {self._cid, *(link.member.cid for link in self._members if link.up)}
        if not document.is_majority(here):
            raise UnreachableError(
                "fewer than half of the members are connected, and the master's keys are not changed then",
                hint="`pmgcm status` shows who is away",
            )

    def _answered(
        self, identity: bytes, master: int, reply: Message, attachments: Sequence[bytes], *, keys: bool
    ) -> None:
        try:
            if reply["op"] == "done":
                for data in attachments[:1]:
                    self._offer_document(master, data)
                if not keys:
                    self._tell(identity, None)
                return
            error = error_from(reply)
        except PmgsyncError as refused:
            error = refused
        # A connection that is lost says nothing about keys: the master may have changed the document, and cut it.
        if not (keys and isinstance(error, UnreachableError)):
            self._tell(identity, error)

    def _tell(self, identity: bytes, error: PmgsyncError | None) -> None:
        waiting = self._waiting.pop(identity, None)
        if waiting is not None:
            send, request = waiting
            send(error_map(request, error) if error else {"op": "done", "id": request, "result": {}}, ())

    def renewed(self) -> None:
        """Answer those who wait for other keys: they are in use."""
        for identity in list(self._waiting):
            self._tell(identity, None)

    def session_over(self, session: Session) -> None:
        """Forget what a session has asked."""
        self._waiting.pop(session.identity, None)

    # -- from members -------------------------------------------------------------------------------------------------

    def handle(self, cid: int, send: Send, message: Message) -> bool:
        """Handle a member's request, on the master; False when it is none of these.

        Raises:
            PmgsyncError: when it is refused.
        """
        if message["op"] != "member.update":
            return False
        request, document = number(message, "id"), self._documents.master_document()
        wanted = _with_shown(document, cid, message)
        if "curve_key" in message:
            change = KeyChange.read(message, document, cid)
            wanted = with_keys(wanted, cid, change.curve_key, change.sign_key)
            log.info("action=keys-of-member cid=%d fingerprint=%s", cid, change.curve_key.hex())

        # Before the document is in force: then this connection is cut.
        def told(signed: SignedDocument) -> None:
            send({"op": "done", "id": request, "result": {}}, (signed.pack(),))

        self._change_document(wanted, told)
        return True


def _with_shown(document: ClusterDocument, cid: int, shown: Mapping[str, Any]) -> ClusterDocument:
    """Return the document with the level and the host keys that a member shows; what is missing stays.

    Raises:
        ProtocolError: when they cannot stand in a document.
        MembershipError: when there is no such member.
    """
    member = document.member(cid)
    if member is None:
        raise MembershipError(f"no member has CID {cid}")
    new = {name: shown[name] for name in ("level", "host_keys") if shown.get(name) is not None}
    checked = Member.from_map({**member.to_map(), **new})
    return with_host(document, cid, checked.level, checked.host_keys)
