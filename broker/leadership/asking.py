"""Requests of this broker itself to other members; each answer comes back to a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from broker.members.calls import Attachments, Calls, End
from broker.members.members import Members, peer
from pmgsync.errors import UnreachableError
from pmgsync.wire.messages import Message

Answer = Callable[[Message, Sequence[bytes]], None]
"""Takes the answer, whose op is `done` or `error`, and its attachments."""
_OWNER = "this broker"


class Asking:
    """Asks members on the control connection to them."""

    def __init__(self, members: Members, calls: Calls, new_id: Callable[[], int]) -> None:
        self._members = members
        self._calls = calls
        self._new_id = new_id

    def ask(self, cid: int, message: Mapping[str, Any], answer: Answer, attachments: Sequence[bytes] = ()) -> bool:
        """Send a member a request that is answered with `done` or `error`.

        `answer` is called once, with the error `unavailable` when the connection is lost; never, while the member is
        silent and the connection seems to live.

        Returns:
            False when the member is not connected: `answer` is not called.
        """

        def take(reply: Mapping[str, Any], parts: Attachments) -> bool:
            answer(dict(reply), [part if isinstance(part, bytes) else part.bytes for part in parts])
            return True

        end = End(_OWNER, take, self._new_id())
        try:
            self._calls.begin(end, peer(cid), partial(self._members.send, cid), dict(message), attachments)
        except UnreachableError:
            return False
        return True
