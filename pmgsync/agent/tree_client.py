"""What a followed tree asks of its owner: sums, entries and contents, by calls through the local broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from pmgsync.core.manifests import BUCKETS, SUM_BYTES, Entry, bucket_of, unpack_changes
from pmgsync.core.positions import MAX_LSN, parse_lsn
from pmgsync.errors import PmgsyncError, ProtocolError, UnreachableError
from pmgsync.files.reading import Part
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, error_from
from pmgsync.wire.peer import CALL_CREDIT, CALL_SILENCE_S

SESSION = "fetch"
POLL_S = 0.5
BUCKETS_AT_ONCE = 256
REQUEST_BYTES = 256 << 10
"""Of the names and digests in one request; a message may have 1 MiB."""
IDLE_S = 60.0
"""After so long without use a session is begun again: the broker forgets silent ones."""

GROWN_BYTES = 64 << 20

Wanted = tuple[bytes, bytes, int, int]
"""Name, digest, the byte to begin at, and the size of the whole."""


class StoppedError(PmgsyncError):
    """The tree is not followed any more."""


class TreeClient:
    """A session beside the worker's own; used by one thread."""

    def __init__(self, path: Path, *, stopping: Callable[[], bool]) -> None:
        """`path`: the broker's socket; `stopping` is asked now and then, and ends what is under way."""
        self._path = path
        self._stopping = stopping
        self._link: BrokerLink | None = None
        self._used = 0.0
        self._cid = 0

    def close(self) -> None:
        """End the session."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def sums(self, owner: int, tree: str) -> tuple[bytes, bytes]:
        """Return the digest of the owner's manifest, and the sums of its groups.

        Raises:
            PmgsyncError: when the owner does not answer, or with what cannot be.
        """
        sums = b""
        for message, parts in self._call(owner, "files.sums", {"tree": tree}):
            if message["op"] == "done":
                digest = _result(message).get("digest")
                if not isinstance(digest, bytes) or len(digest) != SUM_BYTES:
                    raise ProtocolError(f"node {owner} says that {tree} has the digest {digest!r:.60}")
                return digest, sums
            sums += b"".join(parts)
            if len(sums) > BUCKETS * SUM_BYTES:
                raise ProtocolError(f"node {owner} sends more sums of {tree} than there are")
        raise ProtocolError(f"node {owner} did not finish its answer")

    def entries(
        self, owner: int, tree: str, buckets: Sequence[int], most: int
    ) -> Generator[tuple[list[int], dict[bytes, Entry]]]:
        """Yield groups and all the entries that the owner has in them, some groups at a time.

        Args:
            most: entries that a tree may have.

        Raises:
            PmgsyncError: as `sums`.
        """
        for start in range(0, min(len(buckets), BUCKETS), BUCKETS_AT_ONCE):
            asked = list(buckets[start : start + BUCKETS_AT_ONCE])
            groups = frozenset(asked)
            found: dict[bytes, Entry] = {}
            for message, parts in self._call(owner, "files.entries", {"tree": tree, "buckets": asked}):
                for part in parts:
                    for name, entry in unpack_changes(part):
                        if entry is None or name in found or bucket_of(name) not in groups:
                            raise ProtocolError(f"node {owner} sends entries of {tree} that it was not asked for")
                        found[name] = entry
                if len(found) > most:
                    raise ProtocolError(f"node {owner} has more than {most} entries in {tree}")
                if message["op"] == "done":
                    yield asked, found

    def contents(self, owner: int, tree: str, wanted: Sequence[Wanted]) -> Generator[tuple[list[Part], bytes]]:
        """Yield pieces of contents as `read_contents` makes them; numbers are indexes of `wanted`.

        Args:
            wanted: name, digest, the byte to begin at, and the size.

        Raises:
            PmgsyncError: as `sums`.
        """
        start = 0
        while start < len(wanted):
            end, size = start, 0
            while end < len(wanted) and size < REQUEST_BYTES:
                size += len(wanted[end][0]) + 64
                end += 1
            chosen = wanted[start:end]
            items = [[name, digest, offset] for name, digest, offset, _ in chosen]
            # A file that has grown meanwhile may have more; who sends without end is not listened to for ever.
            room = sum(max(0, total - offset) for _, _, offset, total in chosen) + GROWN_BYTES
            for message, parts in self._call(owner, "files.contents", {"tree": tree, "items": items}):
                if message["op"] != "data" or not parts:
                    continue
                found = _parts(message, parts[0], start, end)
                room -= len(parts[0]) + len(found)
                if room < 0:
                    raise ProtocolError(f"node {owner} sends more of the files of {tree} than it was asked for")
                yield found, parts[0]
            start = end

    def barrier(self) -> int:
        """Return an LSN of this node's chain at or above everything committed so far.

        Raises:
            PmgsyncError: when capture does not answer.
        """
        for message, _ in self._call(0, "barrier", {}):
            if message["op"] == "done" and type(lsn := _result(message).get("lsn")) is int:
                return min(max(lsn, 0), MAX_LSN)
        raise ProtocolError("the barrier ended without a result")

    def applied(self, origin: int) -> int:
        """Return the LSN up to which this node has applied an origin's chain, 0 when that is not known.

        Raises:
            PmgsyncError: when the broker does not answer.
        """
        answer, _ = self._session().request({"op": "status"})
        own = [node for node in answer["status"]["nodes"] if node["cid"] == self._cid]
        position = own[0]["positions"].get(str(origin)) if own else None
        return parse_lsn(position) if position else 0

    # -- calls --------------------------------------------------------------------------------------------------------

    def _call(self, target: int, method: str, args: dict[str, Any]) -> Generator[tuple[Message, Sequence[bytes]]]:
        """Like `Peer.call`, but asks every POLL_S whether the thread is to stop."""
        link = self._session()
        request = link.new_id()
        head = {"op": "call", "id": request, "target": target, "method": method}
        ended = False
        try:
            link.send({**head, "args": args, "credit": CALL_CREDIT})
            while True:
                answer, parts = self._next(link, request, method)
                if answer["op"] == "error":
                    ended = True
                    raise error_from(answer)
                ended = answer["op"] == "done"
                yield answer, parts
                if ended:
                    self._used = time.monotonic()
                    return
                if size := sum(map(len, parts)):
                    link.send({"op": "credit", "id": request, "bytes": size})
        finally:
            if not ended:
                with contextlib.suppress(UnreachableError):  # a broker that is gone has forgotten the call
                    link.send({"op": "cancel", "id": request})
                self.close()

    def _next(self, link: BrokerLink, request: int, method: str) -> tuple[Message, Sequence[bytes]]:
        deadline = time.monotonic() + CALL_SILENCE_S
        while time.monotonic() < deadline:
            if self._stopping():
                raise StoppedError(f"{method} was given up")
            received = link.receive(POLL_S)
            if received is None:
                # A broker that was restarted does not know the call; it answers a ping with an error.
                link.send({"op": "ping", "id": 0})
                continue
            answer, parts = received
            if answer["op"] == "error" and answer.get("id") == 0:
                raise error_from(answer)
            if answer.get("id") == request and answer["op"] in {"data", "done", "error"}:
                return answer, parts
        raise UnreachableError(f"nothing of {method!r} came for {CALL_SILENCE_S:.0f} s")

    def _session(self) -> BrokerLink:
        if self._link is not None and time.monotonic() - self._used > IDLE_S:
            self.close()
        if self._link is None:
            link = BrokerLink(self._path, SESSION)
            try:
                self._cid = int(link.hello()[0]["cid"])
            except PmgsyncError:
                link.close()
                raise
            self._link = link
        self._used = time.monotonic()
        return self._link


def _result(message: Message) -> dict[str, Any]:
    result = message.get("result")
    if not isinstance(result, dict):
        raise ProtocolError(f"a call has the result {result!r:.60}")
    return result


def _parts(message: Message, data: bytes, start: int, end: int) -> list[Part]:
    """Return the parts that a piece says it has, numbered from the first content that was asked for."""
    piece = message.get("piece")
    raw = piece.get("parts") if isinstance(piece, dict) else None
    found: list[Part] = []
    total, count = 0, end - start
    for each in raw if isinstance(raw, list) else ():
        number, offset, size, last = each if isinstance(each, list) and len(each) == 4 else (-1, 0, 0, False)
        if not (
            type(number) is int is type(offset)
            and type(size) is int
            and type(last) is bool
            and 0 <= number < count
            and size >= 0
        ):
            raise ProtocolError(f"a piece of a file is {each!r:.60}")
        found.append((start + number, offset, size, last))
        total += size
    if total != len(data):
        raise ProtocolError(f"the pieces of files in {len(data)} bytes have another size")
    return found
