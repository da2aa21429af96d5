"""What an administrator asks through the local socket: status, tokens, and every change of the cluster document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from broker.cluster.tokens import Tokens
from broker.members.calls import Send
from broker.requests.sessions import Session
from broker.requests.shared import number
from pmgsync.core.membership import SignedDocument
from pmgsync.core.synchronous import Setting
from pmgsync.errors import ProtocolError
from pmgsync.wire.messages import Message

CLUSTER_ID_BYTES = 16


class Node(Protocol):
    """The node that is administered; each operation raises PmgsyncError when it is refused."""

    def status(self) -> dict[str, Any]:
        """Return the map of `pmgcm status --json`."""

    def require_master(self) -> None:
        """Return on the master only."""

    def create_cluster(self, cluster: bytes, name: str, profile: str, used: int) -> None:
        """Make this node the master of a new cluster; `used` is the highest CID in rows of an earlier one."""

    def enter_cluster(self, signed: SignedDocument) -> None:
        """Take the place that a master has given this node."""

    def take_document(self, signed: SignedDocument) -> dict[str, Any]:
        """Take a document that the administrator has had fetched, if it is newer; return what is in force then."""

    def leave_cluster(self) -> None:
        """Forget the cluster; not on a master that others need."""

    def decide_split(self, *, dry: bool) -> dict[str, Any]:
        """Keep this side of a split, on its master; `dry`: only say what would be."""

    def delete_member(self, cid: int) -> None:
        """Remove a member, on the master only."""

    def promotion_plan(self, *, force: bool) -> dict[str, Any]:
        """Return the map of `pmgcm promote --dry-run --json`."""

    def promote(self, send: Send, request: int, *, force: bool, agreed: bool) -> None:
        """Make this node the master; each step is told, and the end.

        Args:
            force: without a majority.
            agreed: also when something may be lost.
        """

    def set_synchronous(self, setting: Setting) -> None:
        """Set synchronous mode, on the master only."""

    def update_member(self, session: Session, send: Send, message: Message) -> bool:
        """Have what this node shows of itself changed in the document; it is answered when that is in force."""


class AdminRequests:
    """Serves the command line."""

    def __init__(self, node: Node, tokens: Tokens) -> None:
        self._node = node
        self._tokens = tokens

    def handle(self, session: Session, send: Send, message: Message, attachments: Sequence[bytes]) -> bool:
        """Handle a request; False when it is none of these.

        Raises:
            PmgsyncError: when it is refused.
        """
        match message["op"]:
            case "status":
                send({"op": "status", "id": number(message, "id"), "status": self._node.status()}, ())
                return True
            case "token":
                self._node.require_master()
                ttl_s = number(message, "ttl_s")
                token = self._tokens.issue(ttl_s)
                send({"op": "token", "id": number(message, "id"), "token": token, "expires_s": ttl_s}, ())
                return True
            case "promotion.plan":
                plan = self._node.promotion_plan(force=message.get("force") is True)
                send({"op": "done", "id": number(message, "id"), "result": plan}, ())
                return True
            case "promote":
                force, agreed = message.get("force") is True, message.get("agreed") is True
                self._node.promote(send, number(message, "id"), force=force, agreed=agreed)
                return True
            case "cluster.create":
                cluster = message.get("cluster")
                if not isinstance(cluster, bytes) or len(cluster) != CLUSTER_ID_BYTES:
                    raise ProtocolError("a cluster's id is not 16 bytes")
                used = number(message, "used") if "used" in message else 0
                self._node.create_cluster(cluster, str(message.get("name")), str(message.get("profile")), used)
            case "cluster.enter":
                if len(attachments) != 1:
                    raise ProtocolError("the cluster document is missing")
                self._node.enter_cluster(SignedDocument.unpack(attachments[0]))
            case "document.offer":
                if len(attachments) != 1:
                    raise ProtocolError("the cluster document is missing")
                result = self._node.take_document(SignedDocument.unpack(attachments[0]))
                send({"op": "done", "id": number(message, "id"), "result": result}, ())
                return True
            case "cluster.leave":
                self._node.leave_cluster()
            case "split.decide":
                result = self._node.decide_split(dry=message.get("dry") is not False)
                send({"op": "done", "id": number(message, "id"), "result": result}, ())
                return True
            case "member.delete":
                self._node.delete_member(number(message, "cid"))
            case "synchronous.set":
                self._node.set_synchronous(Setting.from_map(message.get("setting")))
            case "member.update":
                return self._node.update_member(session, send, message)
            case _:
                return False
        send({"op": "done", "id": number(message, "id"), "result": {}}, ())
        return True
