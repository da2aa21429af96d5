"""What other nodes ask of the trees that this node answers for: sums, entries and contents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pmgsync.agent.serving import Piece
from pmgsync.agent.tree_thread import Place
from pmgsync.core.manifests import BUCKETS, Change, Manifest, pack_changes
from pmgsync.errors import ProtocolError, UnreachableError
from pmgsync.files.directories import Root
from pmgsync.files.marker import open_root
from pmgsync.files.reading import read_contents

METHODS = ("files.sums", "files.entries", "files.contents")
ENTRIES_AT_ONCE = 2000
MAX_ITEMS = 20_000


def answer(method: str, args: Mapping[str, Any], place: Place, manifest: Manifest | None) -> Iterator[Piece]:
    """Return the pieces that answer a call; they are made in another thread, so they hold values of their own.

    Raises:
        UnreachableError: when the tree is not scanned yet.
        ProtocolError: when the call asks for what cannot be.
    """
    if manifest is None:
        raise UnreachableError(f"{place.tree.name} is still being scanned on node {place.tree.owner}")
    match method, args:
        case "files.sums", _:
            return _sums(manifest.digest, manifest.sums())
        case "files.entries", {"buckets": list(buckets)}:
            if len(buckets) > BUCKETS or not all(type(each) is int for each in buckets):
                raise ProtocolError(f"entries were asked for of the groups {buckets!r:.60}")
            return _entries(manifest.in_buckets(buckets))
        case "files.contents", {"items": list(items)}:
            return _contents(place, _wanted(manifest, items))
        case _:
            raise ProtocolError(f"{method} was called with {args!r:.100}")


def _sums(digest: bytes, sums: bytes) -> Iterator[Piece]:
    yield {"kind": "sums"}, sums
    yield {"kind": "result", "digest": digest}, None


def _entries(entries: Sequence[Change]) -> Iterator[Piece]:
    for start in range(0, len(entries), ENTRIES_AT_ONCE):
        yield {"kind": "entries"}, pack_changes(entries[start : start + ENTRIES_AT_ONCE])
    yield {"kind": "result", "entries": len(entries)}, None


def _wanted(manifest: Manifest, items: Sequence[object]) -> list[tuple[int, bytes | None, int]]:
    """Return what is asked for; the name is None of what is not in the manifest with that content: it cannot be had."""
    if len(items) > MAX_ITEMS:
        raise ProtocolError(f"{len(items)} files were asked for at once, {MAX_ITEMS} are allowed")
    found: list[tuple[int, bytes | None, int]] = []
    for number, each in enumerate(items):
        match each:
            case [bytes(name), bytes(digest), int(offset)] if 0 <= offset < 1 << 62:
                entry = manifest.get(name)
                right = entry is not None and entry.kind == "f" and entry.digest == digest
                found.append((number, name if right else None, offset))
            case _:
                raise ProtocolError("a file was asked for without a name, a digest and an offset")
    return found


def _contents(place: Place, wanted: Sequence[tuple[int, bytes | None, int]]) -> Iterator[Piece]:
    gone = [[number, -1, 0, True] for number, name, _ in wanted if name is None]
    if gone:
        yield {"kind": "contents", "parts": gone}, b""
    root: Root = open_root(place.tree, place.path, place.cache, create=False)
    try:
        known = ((number, name, offset) for number, name, offset in wanted if name is not None)
        for parts, data in read_contents(root, known):
            yield {"kind": "contents", "parts": parts}, data
    finally:
        root.close()
    yield {"kind": "result", "files": len(wanted) - len(gone)}, None
