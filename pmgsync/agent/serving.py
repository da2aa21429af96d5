"""Calls that are being answered: a thread makes the pieces, the worker's loop sends them as far as credit reaches."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_map
from pmgsync.wire.peer import Peer
from pmgsync.wire.waiting import Wakeup

log = logging.getLogger(__name__)

Piece = tuple[Mapping[str, Any], bytes | None]
"""What a `data` message says of itself, and its attachment; the last one has the kind `result`."""
QUEUED_PIECES = 4
"""Pieces of at most 1 MiB that are made ahead of the receiver's credit."""
MAX_SERVED = 16
"""Calls of one node that a worker answers at once."""
STALLED_S = 60.0
"""After so long without credit the receiver is taken to be gone. Its connection may have ended without anybody being
told, and a snapshot that goes on waiting for it keeps the server's WAL and its dead rows."""
WAIT_NOTICE_S = 3.0
"""After this much silence the receiver is told that something is being waited for."""


class Serving:
    """One call. `pieces` runs in a thread of its own.

    Attributes:
        result: of the call once it is over, None before and after an error.
        caller: CID of the node that has called, None when that does not matter.
    """

    def __init__(self, pieces: Iterator[Piece], credit: int, wakeup: Wakeup, *, caller: object = None) -> None:
        self.result: Mapping[str, Any] | None = None
        self.caller = caller
        self._credit = credit
        self._heard = self._credited = time.monotonic()
        self._wakeup = wakeup
        self._cancelled = threading.Event()
        self._queue: queue.Queue[Piece | PmgsyncError] = queue.Queue(QUEUED_PIECES)
        self._thread = threading.Thread(target=self._make, args=(pieces,), name="serving", daemon=True)
        self._thread.start()

    def add_credit(self, size: int) -> None:
        """Note that the receiver takes so many bytes more."""
        self._credit += size
        self._credited = time.monotonic()

    def cancel(self) -> None:
        """Stop making pieces; what the thread holds is let go of with it."""
        self._cancelled.set()

    def send(self, link: Peer, request: int) -> bool:
        """Send what is ready and may be sent; True when the call is over."""
        while self._credit > 0:
            try:
                piece = self._queue.get_nowait()
            except queue.Empty:
                break
            self._heard = time.monotonic()
            if isinstance(piece, PmgsyncError):
                link.send(error_map(request, piece))
                return True
            described, attachment = piece
            if described["kind"] == "result":
                self.result = {key: value for key, value in described.items() if key != "kind"}
                link.send({"op": "done", "id": request, "result": self.result})
                return True
            parts = () if attachment is None else (attachment,)
            size = len(attachment or b"")
            message: Message = {"op": "data", "id": request, "bytes": size, "piece": described}
            link.send(message, *parts)
            self._credit -= size
        if self._credit <= 0 and time.monotonic() - max(self._heard, self._credited) > STALLED_S:
            log.warning("action=call-stalled id=%d", request)
            self.cancel()
            link.send(error_map(request, UnreachableError(f"nothing of the answer was taken for {STALLED_S:.0f} s")))
            return True
        if self._credit > 0 and time.monotonic() - self._heard > WAIT_NOTICE_S:
            self._heard = time.monotonic()
            link.send({"op": "data", "id": request, "bytes": 0, "piece": {"kind": "wait"}})
        return False

    def _make(self, pieces: Iterator[Piece]) -> None:
        try:
            with closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    if not self._put(piece):
                        return
        except PmgsyncError as error:
            self._put(error)
        except Exception as error:
            log.exception("action=call-failed")
            self._put(PmgsyncError(f"the call failed ({type(error).__name__}: {error})"))

    def _put(self, piece: Piece | PmgsyncError) -> bool:
        while not self._cancelled.is_set():
            try:
                self._queue.put(piece, timeout=0.2)
            except queue.Full:
                continue
            self._wakeup.wake()
            return True
        return False


class Servings:
    """The calls that a worker answers at a time; used by its loop."""

    def __init__(self, wakeup: Wakeup) -> None:
        self._wakeup = wakeup
        self._open: dict[int, Serving] = {}

    def begin(self, message: Message, pieces: Iterator[Piece]) -> None:
        """Answer a call with pieces.

        Raises:
            UnreachableError: when too many of the caller's are answered already.
        """
        caller = message.get("caller")
        if sum(serving.caller == caller for serving in self._open.values()) >= MAX_SERVED:
            raise UnreachableError(f"{MAX_SERVED} calls of node {caller} are answered already")
        credit = int(message.get("credit", 0))
        self._open[int(message["id"])] = Serving(pieces, credit, self._wakeup, caller=caller)

    def take(self, link: Peer, message: Message, begin: Callable[[Message], None]) -> bool:
        """Take a message about a call; False when it is about something else.

        Args:
            begin: begins to answer a call, or answers it; what it raises is the answer.
        """
        request = int(message.get("id", 0))
        match message["op"]:
            case "call":
                try:
                    begin(message)
                except PmgsyncError as error:
                    link.send(error_map(request, error))
            case "credit" if request in self._open:
                self._open[request].add_credit(int(message["bytes"]))
            case "cancel" if request in self._open:
                self._open.pop(request).cancel()
                log.info("action=call-cancelled id=%d", request)
            case "credit" | "cancel":
                pass
            case _:
                return False
        return True

    def send(self, link: Peer) -> dict[int, Serving]:
        """Send what is ready, and return the calls that are over now, by request."""
        over = {request: serving for request, serving in self._open.items() if serving.send(link, request)}
        for request in over:
            del self._open[request]
        return over

    def close(self) -> None:
        """Give all of them up."""
        for serving in self._open.values():
            serving.cancel()
        self._open.clear()
