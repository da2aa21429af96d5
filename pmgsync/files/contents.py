"""The contents that a batch needs, on their way to the staging area: from this tree itself, or in pieces from afar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pmgsync.core.manifests import Entry
from pmgsync.files.directories import Root, explain
from pmgsync.files.scan import LARGE_BYTES
from pmgsync.files.staging import Data, Part, Staging, WrongContentError


@dataclass(frozen=True, slots=True)
class Need:
    """A content to be fetched: one of the names that have it at the owner, and what that becomes here."""

    name: bytes
    entry: Entry

    @property
    def digest(self) -> bytes:
        """The digest of the content."""
        return self.entry.digest


class Contents:
    """Used by one thread; contents come one after the other."""

    def __init__(self, root: Root, staging: Staging) -> None:
        self._root = root
        self._staging = staging
        self._names: dict[bytes, bytes] = {}
        # A large file that others go before stays open: what is here of it would be hashed again.
        self._parts: dict[bool, Part] = {}

    def learn(self, entries: Iterable[tuple[bytes, Entry]], *, anew: bool = False) -> None:
        """Note under which names this tree has contents; `anew`: these are all."""
        if anew:
            self._names.clear()
        for name, entry in entries:
            if entry.kind == "f":
                self._names[entry.digest] = name

    @property
    def known(self) -> int:
        """How many contents are known to be in this tree; some may be gone by now."""
        return len(self._names)

    def missing(self, needs: Iterable[Need]) -> list[tuple[Need, int]]:
        """Return which contents must be fetched, and from which byte on.

        What this tree has under another name (a file that was moved, or is there twice) is taken from there.

        Raises:
            FilesError: when the staging area cannot be written.
        """
        found = []
        try:
            for need in needs:
                if need.digest in self._staging.whole:
                    continue
                known = self._names.get(need.digest)
                if known is not None and self._staging.copy(need.digest, self._root, known):
                    continue
                found.append((need, self._staging.begun(need.digest)))
        except OSError as error:
            raise explain(error, f"cannot write to {self._root.path}") from error
        return found

    def stage(self, need: Need, offset: int, data: Data, *, last: bool) -> None:
        """Take a piece of a content.

        Raises:
            FilesError: when it is wrong or cannot be written.
        """
        try:
            self._stage(need, offset, data, last=last)
        except OSError as error:
            self.let_go()
            raise explain(error, f"cannot write {self._root.show(need.name)}") from error
        except WrongContentError:
            self.let_go()
            raise

    def _stage(self, need: Need, offset: int, data: Data, *, last: bool) -> None:
        end = offset + len(data)
        if end > need.entry.size or (last and end != need.entry.size):
            raise WrongContentError(f"{self._root.show(need.name)} has another size than was announced")
        if offset == 0 and last:
            self._staging.put(need.digest, data, need.entry)
            return
        large = need.entry.size > LARGE_BYTES
        part = self._parts.get(large)
        if part is None or part.digest != need.digest:
            self._close(large)
            part = self._parts[large] = self._staging.part(need.digest)
        part.write(offset, data)
        if last:
            part.finish()
            self._close(large)

    def let_go(self, *, large: bool = True) -> None:
        """Close what is only partly staged, a large file only on demand; it is gone on with later."""
        self._close(False)
        if large:
            self._close(True)

    def _close(self, large: bool) -> None:
        if (part := self._parts.pop(large, None)) is not None:
            part.close()
