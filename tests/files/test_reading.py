"""Contents on their way out."""

from __future__ import annotations

import os
from pathlib import Path

from pmgsync.files.directories import Root
from pmgsync.files.reading import PIECE_BYTES, read_contents


def test_a_file_that_grows_while_it_is_read_is_read_in_full_pieces(tmp_path: Path) -> None:
    path = tmp_path / "grows"
    path.write_bytes(os.urandom(PIECE_BYTES + PIECE_BYTES // 2))
    root = Root(tmp_path)
    pieces = read_contents(root, [(0, b"grows", 0)])
    found = [next(pieces)]
    with path.open("ab") as file:
        file.write(os.urandom(3 * PIECE_BYTES))
    found += pieces
    root.close()
    assert b"".join(data for _, data in found) == path.read_bytes()
    assert len(found) <= 6
    assert [last for parts, _ in found for *_, last in parts].count(True) == 1
