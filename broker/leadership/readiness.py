"""Whether this node could be master as far as its own database goes: its agent is asked again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.members.calls import Attachments, End
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_from

AGAIN_S = 0.3
CREDIT = 1 << 20
METHOD = "tables.incomplete"

AskAgent = Callable[[End, str, Message | None], None]
"""Has this node's agent answer a call; raises UnreachableError when it cannot."""


class Readiness:
    """What this node's agent and its divergence files say."""

    def __init__(self, origin: int, divergence: DivergenceFiles, ask_agent: AskAgent) -> None:
        """Begin; `origin` is the CID of the master."""
        self._origin = origin
        self._divergence = divergence
        self._ask_agent = ask_agent
        self._asked_at = 0.0
        self._tables: list[str] | None = None
        self._error: PmgsyncError | None = None

    def problem(self) -> PmgsyncError | None:
        """Return what stands against it now, None when nothing does. It may be over a moment later."""
        now = time.monotonic()
        if now - self._asked_at >= AGAIN_S:
            self._asked_at = now
            args = {"origin": self._origin}
            message: Message = {"op": "call", "method": METHOD, "args": args, "credit": CREDIT}
            try:
                self._ask_agent(End("promotion", self._answered, 0), METHOD, message)
            except PmgsyncError as error:
                self._error = error
        if self._error is not None:
            return self._error
        if self._tables is None:
            return UnreachableError("this node's agent has not said yet how its tables are")
        if self._tables:
            return PmgsyncError(
                f"this node does not have all of {', '.join(self._tables[:5])}",
                hint="`pmgcm status` says why; promote another node, or wait until it is fetched",
            )
        if self._divergence.pending():
            return UnreachableError("this node still exports what it had of an earlier master")
        return None

    def _answered(self, message: Mapping[str, Any], _: Attachments) -> bool:
        if message["op"] == "error":
            self._error = error_from(dict(message))
        elif message["op"] == "done":
            self._error, self._tables = None, [str(name) for name in message["result"]["tables"]]
        return True
