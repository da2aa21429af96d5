"""Manifests: what a tree of files holds, as entries by name, with a digest that follows each change. Pure.

Trees are compared by sums, not by logs of changes. A manifest has 4096 sums over groups of names, corrected by each
change. Two nodes that differ, for whatever reason (a lost announcement, a restart, a cache that is gone), exchange 64
KiB and then the entries of the groups that differ. A log of changes would be one more thing to keep, to trim, and to be
wrong about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgpack

from pmgsync.core.filenames import check_name, show
from pmgsync.core.nesting import check_nesting
from pmgsync.errors import ProtocolError

DIGEST_BYTES = 32
BUCKETS = 4096
"""Two nodes that differ compare sums of so many groups of names, and then the entries of the groups that differ."""
SUM_BYTES = 16
_MODULUS = 1 << (8 * SUM_BYTES)
MAX_SIZE = 1 << 50
MAX_NANOSECONDS = 1 << 63


class Entry(NamedTuple):
    """What is kept the same of one file or directory.

    Attributes:
        kind: "f" for a file, "d" for a directory.
        mode: the permission bits, at most 0o7777.
        user, group: names; a number as text where the owner's system has none.
        size, mtime_ns: of files; 0 for directories.
        digest: BLAKE2b of 32 bytes over a file's content, b"" for directories.
    """

    kind: Literal["f", "d"]
    mode: int
    user: str
    group: str
    size: int = 0
    mtime_ns: int = 0
    digest: bytes = b""

    def same_content(self, other: Entry | None) -> bool:
        """True when the other is the same kind of thing and has the same content."""
        return other is not None and (self.kind, self.digest) == (other.kind, other.digest)


Change = tuple[bytes, Entry | None]
"""A name and what it is now, None when it is gone."""


def bucket_of(name: bytes) -> int:
    """Return the group that a name is compared in."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=2).digest(), "big") % BUCKETS


class Manifest:
    """The entries of one tree, with the sums that tell whether two are equal.

    A sum of hashes modulo 2¹²⁸ does not depend on the order and is corrected by each change, so a change in a tree of
    200 000 files costs two hashes. Contents are proved by their own digests, not by these sums.

    Attributes:
        files, bytes: how many files, and the bytes of their contents.
        text_bytes: of all names, users and groups: what the manifest takes in memory grows with them.
    """

    def __init__(self, entries: Iterable[tuple[bytes, Entry]] = ()) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._sums: list[int] = [0] * BUCKETS
        # One for all entries: `packb` makes and throws away a packer, and its buffer, for each.
        self._pack = msgpack.Packer(use_bin_type=True).pack
        self._total = 0
        self.files = 0
        self.bytes = 0
        self.text_bytes = 0
        for name, entry in entries:
            self.set(name, entry)

    def set(self, name: bytes, entry: Entry | None) -> bool:
        """Put an entry in place of what a name had, None to forget it; False when that changes nothing."""
        old = self._entries.get(name)
        if old == entry:
            return False
        difference = 0
        if old is not None:
            difference -= self._weight(name, old)
            self._count(name, old, -1)
        if entry is None:
            del self._entries[name]
        else:
            self._entries[name] = entry
            difference += self._weight(name, entry)
            self._count(name, entry, 1)
        bucket = bucket_of(name)
        self._sums[bucket] = (self._sums[bucket] + difference) % _MODULUS
        self._total = (self._total + difference) % _MODULUS
        return True

    def _weight(self, name: bytes, entry: Entry) -> int:
        data = self._pack([name, *entry])
        return int.from_bytes(hashlib.blake2b(data, digest_size=SUM_BYTES).digest(), "big")

    def _count(self, name: bytes, entry: Entry, sign: int) -> None:
        self.text_bytes += sign * (len(name) + len(entry.user) + len(entry.group))
        if entry.kind == "f":
            self.files += sign
            self.bytes += sign * entry.size

    def get(self, name: bytes) -> Entry | None:
        """Return what a name is, None when there is nothing."""
        return self._entries.get(name)

    def items(self) -> Iterable[tuple[bytes, Entry]]:
        """Return names and entries, in no order."""
        return self._entries.items()

    @property
    def entries(self) -> Mapping[bytes, Entry]:
        """The entries by name; they change with the manifest."""
        return MappingProxyType(self._entries)

    def below(self, directory: bytes) -> list[bytes]:
        """Return the names in a directory, at any depth."""
        prefix = directory + b"/"
        return [name for name in self._entries if name.startswith(prefix)]

    def copy(self) -> Manifest:
        """Return one that changes by itself."""
        new = Manifest()
        new._entries, new._sums, new._total = dict(self._entries), list(self._sums), self._total
        new.files, new.bytes, new.text_bytes = self.files, self.bytes, self.text_bytes
        return new

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    @property
    def digest(self) -> bytes:
        """The sum over all entries, 16 bytes."""
        return self._total.to_bytes(SUM_BYTES, "big")

    def sums(self) -> bytes:
        """Return the sums of all groups, one after the other."""
        return b"".join(each.to_bytes(SUM_BYTES, "big") for each in self._sums)

    def differing(self, sums: bytes) -> list[int]:
        """Return the groups in which another manifest, of which these are the sums, differs.

        Raises:
            ProtocolError: when they are not `BUCKETS` sums.
        """
        if len(sums) != BUCKETS * SUM_BYTES:
            raise ProtocolError(f"the sums of a manifest have {len(sums)} bytes, expected {BUCKETS * SUM_BYTES}")
        own = self.sums()
        return [
            number
            for number in range(BUCKETS)
            if own[number * SUM_BYTES : (number + 1) * SUM_BYTES] != sums[number * SUM_BYTES : (number + 1) * SUM_BYTES]
        ]

    def in_buckets(self, buckets: Iterable[int]) -> list[tuple[bytes, Entry]]:
        """Return the entries of some groups."""
        wanted = frozenset(buckets)
        return [(name, entry) for name, entry in self._entries.items() if bucket_of(name) in wanted]

    def with_buckets(self, buckets: Iterable[int], entries: Mapping[bytes, Entry]) -> list[Change]:
        """Return the changes that make these groups hold exactly these entries."""
        gone = [(name, None) for name, _ in self.in_buckets(buckets) if name not in entries]
        return [*gone, *((name, entry) for name, entry in entries.items() if self._entries.get(name) != entry)]


def changes_between(old: Manifest, new: Manifest) -> list[Change]:
    """Return what makes the one manifest into the other."""
    gone: list[Change] = [(name, None) for name in old if name not in new]
    return [*gone, *((name, entry) for name, entry in new.items() if old.get(name) != entry)]


def pack_changes(changes: Iterable[Change]) -> bytes:
    """Return changes as they travel: an array of [name, kind, mode, user, group, size, mtime_ns, digest] or [name]."""
    rows = [[name, *entry] if entry is not None else [name] for name, entry in changes]
    return msgpack.packb(rows, use_bin_type=True)  # type: ignore[no-any-return]


def unpack_changes(data: bytes) -> list[Change]:
    """Return the changes in bytes from the network; every name is safe to use below a root.

    Raises:
        ProtocolError: when they are anything else.
    """
    try:
        rows = msgpack.unpackb(data, raw=False, strict_map_key=False, max_ext_len=0)
    except Exception as error:  # msgpack raises ValueError and its own types
        raise ProtocolError(f"entries of a tree are malformed ({error})") from error
    check_nesting(rows)
    if not isinstance(rows, list):
        raise ProtocolError("entries of a tree are not a list")
    return [_change(row) for row in rows]


def _change(row: Any) -> Change:
    if not isinstance(row, list) or len(row) not in {1, 8}:
        raise ProtocolError(f"an entry of a tree is {row!r:.100}")
    if len(row) == 1:
        return check_name(row[0]), None
    name = check_name(row[0])
    return name, check_entry(name, Entry(*row[1:]))


def check_entry(name: bytes, entry: Entry) -> Entry:
    """Return the entry of a name when it can be a tree's.

    Raises:
        ProtocolError: when it cannot.
    """
    # Without loops and generators: a first sync checks every name of a tree.
    kind, mode, user, group, size, mtime_ns, digest = entry
    if (
        (type(mode) is int and type(size) is int and type(mtime_ns) is int)
        and (0 <= mode <= 0o7777 and 0 <= size <= MAX_SIZE and 0 <= mtime_ns <= MAX_NANOSECONDS)
        and (isinstance(user, str) and 0 < len(user) <= 255 and user.isprintable())
        and (isinstance(group, str) and 0 < len(group) <= 255 and group.isprintable())
        and (
            (kind == "f" and isinstance(digest, bytes) and len(digest) == DIGEST_BYTES)
            or (kind == "d" and size == 0 and mtime_ns == 0 and digest == b"")
        )
    ):
        return entry
    raise ProtocolError(f"the entry of {show(name)} is {list(entry)!r:.200}")
