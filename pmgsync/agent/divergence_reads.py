"""What the master's command line asks of a node that has a divergence file: its lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pmgsync.agent.serving import Piece
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import ProtocolError

METHOD = "divergence.read"
PIECE_BYTES = 512 << 10


def answer_divergence(args: Mapping[str, Any], files: DivergenceFiles) -> Iterator[Piece]:
    """Return the pieces that answer a call.

    Raises:
        ProtocolError: when the call names no file.
        ConfigError: when there is none of that name.
    """
    match args:
        case {"id": str(name)}:
            return _pieces(files.read(name).path.read_bytes())
    raise ProtocolError(f"{METHOD} was called with {args!r:.100}")


def _pieces(data: bytes) -> Iterator[Piece]:
    for start in range(0, len(data), PIECE_BYTES):
        yield {"kind": "lines"}, data[start : start + PIECE_BYTES]
    yield {"kind": "result", "size": len(data)}, None
