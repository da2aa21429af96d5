"""Contents on their way out: files are read in pieces, small ones together, for whoever asked for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from pmgsync.files.directories import Root

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
    parts: list[Part] = []
    held = bytearray()
    for number, name, start in wanted:
        try:
            file = root.open_file(name)
        except OSError:
            parts.append((number, -1, 0, True))
            continue
        try:
            offset = os.lseek(file, start, os.SEEK_SET)
            ended = False
            while not ended:
                data = os.read(file, PIECE_BYTES - len(held))
                # Less than was asked for is the end of a regular file; a full piece may have more behind it.
                ended = len(data) < PIECE_BYTES - len(held)
                parts.append((number, offset, len(data), ended))
                held += data
                offset += len(data)
                if len(held) >= PIECE_BYTES:
                    yield parts, bytes(held)
                    parts, held = [], bytearray()
        except OSError:
            parts.append((number, -1, 0, True))
        finally:
            os.close(file)
    if parts:
        yield parts, bytes(held)
