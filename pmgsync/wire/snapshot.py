"""Fetching a snapshot: the pieces of a `snapshot` call are fed to a restore, one by one, until the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Protocol

from pmgsync.errors import ProtocolError
from pmgsync.wire.peer import Peer


class Restore(Protocol):
    """What the pieces become."""

    def feed(self, piece: Mapping[str, Any], attachment: bytes | None) -> None:
        """Take the next piece; raises PmgsyncError when it cannot."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Take the end; raises PmgsyncError when something is missing."""


def fetch_snapshot(
    peer: Peer,
    args: Mapping[str, Any],
    restore: Restore,
    *,
    target: int = 0,
    on_message: Callable[[], None] | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Mapping[str, Any]:
    """Ask for a snapshot and feed it to a restore; return its result.

    Args:
        args: of the method `snapshot` (PROTOCOL.md, section 4).
        target: CID of the node that is asked, when the peer is the local broker.
        on_message: called before each piece is fed, and before the end; what it raises gives the snapshot up.
        waiting: called with what the sender waits for, "" when it does not say.

    Raises:
        UnreachableError: when the peer has gone silent.
        ProtocolError: when it sends what cannot be.
        PmgsyncError: the error that the call ended with, or the restore's.
    """
    # Closed before the socket, so that the sender is told that the rest is not wanted.
    with closing(peer.call("snapshot", args, target=target)) as messages:
        for message, parts in messages:
            if on_message is not None:
                on_message()
            if message["op"] == "done":
                result = message.get("result")
                if not isinstance(result, dict):
                    raise ProtocolError(f"the snapshot has a result {result!r:.40}")
                restore.finish(result)
                return result
            piece = message.get("piece")
            if not isinstance(piece, dict):
                raise ProtocolError(f"the snapshot has a piece {piece!r:.40}")
            if piece.get("kind") == "wait":
                if waiting is not None:
                    waiting(str(piece.get("for", "")))
            else:
                restore.feed(piece, parts[0] if parts else None)
    raise ProtocolError("the snapshot ended without a result")
