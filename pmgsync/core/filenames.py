"""File names below a tree's root: which are safe to use, which a profile selects, and how messages show them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pmgsync.errors import ProtocolError

OWN_DIRECTORY = b".pmgsync"
"""At the root of every tree: the marker, and what is being staged. It is never synchronised."""
CONFLICT_MARK = b".pmgsync-"
"""In the name of a copy that was kept beside a file; such copies are never synchronised."""
MAX_COMPONENT = 255
MAX_NAME = 3000
"""Bytes of a whole name; the kernel takes 4095 for a path, and the root needs some of them."""
MAX_DEPTH = 64
_NO_PARTS = frozenset({b"", b".", b".."})


def check_name(name: object) -> bytes:
    """Return a name when it cannot mean anything outside the tree; any bytes but NUL may be in it.

    Raises:
        ProtocolError: when it is absolute, has `.`, `..` or an empty part, is too long, or is in the own directory.
    """
    if not isinstance(name, bytes) or not name or len(name) > MAX_NAME or b"\0" in name:
        raise ProtocolError(f"{show(name)} is not a file's name")
    parts = name.split(b"/")
    fits = len(parts) <= MAX_DEPTH
    for part in parts:
        fits = fits and len(part) <= MAX_COMPONENT and part not in _NO_PARTS
    if not fits:
        raise ProtocolError(f"the name {show(name)} could leave the tree, or is too long")
    if parts[0] == OWN_DIRECTORY:
        raise ProtocolError(f"the name {show(name)} is in the directory of pmgsync itself")
    return name


def show(name: object) -> str:
    """Return a name as messages show it: one line, at most 200 characters, whatever bytes it has."""
    if not isinstance(name, bytes):
        return f"{name!r:.60}"
    text = name[: MAX_NAME + 1].decode(errors="backslashreplace")
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def parents(name: bytes) -> Iterable[bytes]:
    """Yield the directories that a name lies in, the outermost first."""
    at = name.find(b"/")
    while at >= 0:
        yield name[:at]
        at = name.find(b"/", at + 1)


class Selection:
    """What a profile's patterns select of a tree.

    `include`: names from the root on; one that ends in "/" is a directory with everything in it; none: everything.
    `exclude`: one with "/" inside is a name from the root on, any other matches the last part of a name at any depth;
    what lies in an excluded directory is excluded too. `*`, `?` and `[...]` match within one part.
    """

    def __init__(self, include: Iterable[str], exclude: Iterable[str]) -> None:
        given = [_parts(pattern) for pattern in include]
        self._include = [(tuple(map(_regex, parts)), whole) for parts, whole in given]
        self._exclude_anywhere: list[re.Pattern[bytes]] = []
        self._exclude_from_root: list[tuple[re.Pattern[bytes], ...]] = []
        for pattern in exclude:
            parts, _ = _parts(pattern)
            if len(parts) == 1:
                self._exclude_anywhere.append(_regex(parts[0]))
            else:
                self._exclude_from_root.append(tuple(map(_regex, parts)))
        self._has_patterns = bool(self._include or self._exclude_anywhere or self._exclude_from_root)

    def excludes(self, name: bytes) -> bool:
        """True when the name itself is never synchronised; ask for the directories above it separately."""
        last = name.rpartition(b"/")[2]
        if name == OWN_DIRECTORY or CONFLICT_MARK in last:
            return True
        if not self._has_patterns:
            return False
        if any(pattern.fullmatch(last) for pattern in self._exclude_anywhere):
            return True
        parts = name.split(b"/") if self._exclude_from_root else []
        return any(len(each) == len(parts) and _match(each, parts) for each in self._exclude_from_root)

    def takes(self, name: bytes) -> bool:
        """True when a name that nothing excludes is synchronised."""
        if not self._include:
            return True
        parts = name.split(b"/")
        return any(
            _match(patterns, parts) and (len(parts) == len(patterns) or (whole and len(parts) > len(patterns)))
            for patterns, whole in self._include
        )

    def enters(self, directory: bytes) -> bool:
        """True when something in a directory may be taken."""
        if not self._include:
            return True
        parts = directory.split(b"/")
        return any(
            _match(patterns, parts) and (whole or len(parts) < len(patterns)) for patterns, whole in self._include
        )

    def selects(self, name: bytes) -> bool:
        """True when a name is synchronised, all rules taken together."""
        if not self._has_patterns:
            return CONFLICT_MARK not in name and name.partition(b"/")[0] != OWN_DIRECTORY
        return self.takes(name) and not self.excludes(name) and not any(map(self.excludes, parents(name)))


def _parts(pattern: str) -> tuple[list[bytes], bool]:
    """Return a pattern's parts, and whether it means a directory with everything in it."""
    raw = pattern.encode("utf-8", "surrogateescape")
    return [part for part in raw.split(b"/") if part not in {b"", b"."}], raw.endswith(b"/")


def _match(patterns: tuple[re.Pattern[bytes], ...], parts: list[bytes]) -> bool:
    """True when the parts that both have agree."""
    return all(pattern.fullmatch(part) for pattern, part in zip(patterns, parts, strict=False))


def _regex(glob: bytes) -> re.Pattern[bytes]:
    """Return the expression of one part: `fnmatch` would let `*` cross "/" and fold nothing, so it is spelled out."""
    found, at = b"", 0
    while at < len(glob):
        each = glob[at : at + 1]
        end = glob.find(b"]", at + 2) if each == b"[" else -1
        if each == b"*":
            found += b"[^/]*"
        elif each == b"?":
            found += b"[^/]"
        elif end > 0:
            inner = glob[at + 1 : end].replace(b"\\", b"\\\\")
            found += b"[" + (b"^" + inner[1:] if inner[:1] == b"!" else inner) + b"]"
            at = end
        else:
            found += re.escape(each)
        at += 1
    return re.compile(found, re.DOTALL)
