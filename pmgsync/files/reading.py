"""Reading files: contents in pieces, small ones together, for whoever asked for them; and what stands under a name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from pmgsync.core.manifests import Entry
from pmgsync.files.directories import Neighbour, Root, open_regular
from pmgsync.files.hashing import ChangedMeanwhileError, hash_file

PIECE_BYTES = 1 << 20
"""The most that one message may carry (PROTOCOL.md, section 8)."""

Part = tuple[int, int, int, bool]
"""Which of the asked for contents, the byte it goes on at (-1: it cannot be had), how many bytes, is that its end."""


def read_contents(root: Root, wanted: Iterable[tuple[int, bytes, int]]) -> Iterator[tuple[list[Part], bytes]]:
    """Yield pieces: a list of parts, and the bytes of all of them one after the other.

    A file that is written meanwhile is sent as it is read: the receiver knows the digest, sees that it is another
    content, and asks again when it was announced anew.

    Args:
        wanted: of each content its number, the name it is read under, and the byte to begin at.
    """
    neighbour = Neighbour(root)
    parts: list[Part] = []
    held: list[bytes] = []
    size = 0  # of all that is held
    try:
        for number, name, start in wanted:
            try:
                file, status = open_regular(*neighbour.parent(name))
            except OSError:
                parts.append((number, -1, 0, True))
                continue
            try:
                expected = status.st_size
                if size and PIECE_BYTES - size < expected <= PIECE_BYTES:
                    # What fits into one piece is not divided: it is staged in one step then.
                    yield parts, b"".join(held)
                    parts, held, size = [], [], 0
                offset = os.lseek(file, start, os.SEEK_SET) if start else 0
                ended = False
                while not ended:
                    if offset > expected:
                        expected = os.fstat(file).st_size  # it has grown
                    # One byte more than it has shows that it has grown; and room costs time, see hash_descriptor.
                    room = min(PIECE_BYTES - size, max(0, expected - offset) + 1)
                    data = os.read(file, room)
                    # Less than was asked for is the end of a regular file; a full piece may have more behind it.
                    ended = len(data) < room
                    parts.append((number, offset, len(data), ended))
                    held.append(data)
                    offset, size = offset + len(data), size + len(data)
                    if size >= PIECE_BYTES:
                        yield parts, b"".join(held)
                        parts, held, size = [], [], 0
            except OSError:
                parts.append((number, -1, 0, True))
            finally:
                os.close(file)
    finally:
        neighbour.close()
    if parts:
        yield parts, b"".join(held)


def find_standing(root: Root, wanted: Iterable[tuple[bytes, Entry]]) -> Iterator[tuple[bytes, Entry]]:
    """Yield names, of those that were never put in place here, under which something stands, and what that is.

    Args:
        wanted: names, those in one directory one after the other, and what they are to become.
    """
    neighbour = Neighbour(root)
    missing: bytes | None = None
    try:
        for name, entry in wanted:
            outer = name.rpartition(b"/")[0]
            if outer == missing:
                continue
            try:
                fd, last = neighbour.parent(name)
            except OSError:
                missing = outer
                continue
            if (here := _standing(fd, last, entry)) is not None:
                yield name, here
    finally:
        neighbour.close()


def _standing(fd: int, last: bytes, wanted: Entry) -> Entry | None:
    # Mostly nothing is there: an exception would take longer than the question.
    if not os.access(last, os.F_OK, dir_fd=fd, follow_symlinks=False):
        return None
    try:
        status = os.stat(last, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            # As if nothing were there: making it sets its mode, too.
            return wanted._replace(mode=-1) if wanted.kind == "d" else Entry("d", 0, "", "")
        if stat.S_ISREG(status.st_mode):
            return Entry("f", -1, "", "", status.st_size, 0, hash_file(fd, last)[0])
    except ChangedMeanwhileError:
        return Entry("f", -1, "", "")
    except OSError:
        return None  # nothing is there; the pass says when something is wrong
    return None
