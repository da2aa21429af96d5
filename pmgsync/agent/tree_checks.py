"""What `pmgcm verify` asks of a node's trees: every content hashed anew, and single names fetched again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pmgsync.agent.serving import Piece
from pmgsync.agent.tree_thread import Place
from pmgsync.core.filenames import Selection, check_name
from pmgsync.core.manifests import Change, Entry, pack_changes
from pmgsync.errors import ProtocolError
from pmgsync.files.directories import RootMissingError
from pmgsync.files.marker import open_root
from pmgsync.files.scan import Scanner

ENTRIES_AT_ONCE = 2000
MAX_NAMES = 20_000
SLICE_S = 0.05


def read_names(given: object) -> list[bytes] | None:
    """Return the names in a call, None when it means all.

    Raises:
        ProtocolError: when they are malformed.
    """
    if given is None:
        return None
    if not isinstance(given, list) or len(given) > MAX_NAMES:
        raise ProtocolError(f"files were asked for as {given!r:.60}")
    return list(map(check_name, given))


def verify_tree(place: Place, names: Sequence[bytes] | None, share: int) -> Iterator[Piece]:
    """Yield the entries of a tree, all hashed from the disk; of a spool also the names that were purged here.

    Args:
        names: only these; None: all.
        share: per cent of the time that is spent reading.
    """
    begun = [time.monotonic()]

    def pulse() -> None:
        worked = time.monotonic() - begun[0]
        if worked > SLICE_S:
            time.sleep(worked * (100 / share - 1))
            begun[0] = time.monotonic()

    chosen = None if names is None else set(names)
    entries: dict[bytes, Entry | None] = {}
    if not place.tree.is_config:
        entries.update((name, None) for name in place.cache.held(place.tree.name) if chosen is None or name in chosen)
    yield {"kind": "begun"}, b""
    try:
        root = open_root(place.tree, place.path, place.cache, create=False)
    except RootMissingError:
        root = None
    if root is not None:
        try:
            selection = Selection(place.tree.rule.include, place.tree.rule.exclude)
            scanner = Scanner(root, selection, place.limits, pulse=pulse)
            if names is None:
                scanner.scan(settling=False)
            else:
                scanner.look(names, settling=False)
            entries.update(scanner.found.manifest.items())
        finally:
            root.close()
    changes: list[Change] = list(entries.items())
    for start in range(0, len(changes), ENTRIES_AT_ONCE):
        yield {"kind": "entries"}, pack_changes(changes[start : start + ENTRIES_AT_ONCE])
    yield {"kind": "result", "entries": len(changes)}, None
