"""Announcements: what the owner of a tree publishes of it, with the newest changes when they are few. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgpack

from pmgsync.core.manifests import SUM_BYTES, Change, pack_changes, unpack_changes
from pmgsync.core.nesting import check_nesting
from pmgsync.core.positions import MAX_LSN
from pmgsync.errors import ProtocolError

MAX_CHANGES_BYTES = 48 << 10
"""Longer changes are not published: the others ask for what they lack."""
MAX_ANNOUNCEMENT = 64 << 10
MAX_TREE_NAME = 1000


def in_parts(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Yield changes in parts that an announcement has room for."""
    part: list[Change] = []
    size = 0
    for name, entry in changes:
        more = len(name) + 16
        if entry is not None:
            more += 80 + len(entry.user.encode()) + len(entry.group.encode())
        if part and size + more > MAX_CHANGES_BYTES:
            yield part
            part, size = [], 0
        part.append((name, entry))
        size += more
    if part:
        yield part


@dataclass(frozen=True, slots=True)
class Announcement:
    """One announcement.

    Attributes:
        tree: its name.
        digest: of the manifest as it is.
        base: of the manifest that `changes` made into it.
        changes: None when they are too many, or nothing changed.
        lsn: of the owner's chain: what was committed there before the files changed is at or below it; 0: not told.
    """

    tree: str
    digest: bytes
    base: bytes
    changes: tuple[Change, ...] | None = None
    lsn: int = 0

    def pack(self) -> bytes:
        """Return the form that travels; too many changes are left out."""
        changes = pack_changes(self.changes) if self.changes else b""
        if len(changes) > MAX_CHANGES_BYTES:
            changes = b""
        data = {"tree": self.tree, "digest": self.digest, "base": self.base, "changes": changes, "lsn": self.lsn}
        return msgpack.packb(data, use_bin_type=True)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> Announcement:
        """Return the announcement in bytes from the network.

        Raises:
            ProtocolError: when it is none.
        """
        try:
            raw = msgpack.unpackb(data, raw=False, strict_map_key=False, max_ext_len=0)
            check_nesting(raw)
            tree, digest, base, lsn = raw["tree"], raw["digest"], raw["base"], raw["lsn"]
            changes = raw["changes"]
        except ProtocolError:
            raise
        except Exception as error:  # any shape may come
            raise ProtocolError(f"an announcement is malformed ({type(error).__name__}: {error})") from error
        if not isinstance(tree, str) or len(tree) > MAX_TREE_NAME or type(lsn) is not int or not 0 <= lsn <= MAX_LSN:
            raise ProtocolError(f"an announcement is of {tree!r:.60} at {lsn!r:.30}")
        if any(not isinstance(each, bytes) or len(each) != SUM_BYTES for each in (digest, base)):
            raise ProtocolError(f"an announcement has the digests {digest!r:.60} and {base!r:.60}")
        if not isinstance(changes, bytes):
            raise ProtocolError(f"an announcement has the changes {changes!r:.60}")
        return cls(tree, digest, base, tuple(unpack_changes(changes)) if changes else None, lsn)
