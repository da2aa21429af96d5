"""What `pmgcm verify` asks of a node's database: sums of chunks, rows of those that differ, a table fetched anew."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from pmgsync.agent.serving import Piece
from pmgsync.core.comparisons import Row
from pmgsync.core.profile import Profile
from pmgsync.errors import ProtocolError
from pmgsync.postgres.copy.checksums import (
    MAX_CHUNKS,
    Compared,
    checking,
    chunk_sums,
    compared_tables,
    fetch_again,
    rows_in_chunks,
)

METHODS = ("rows.tables", "rows.sums", "rows.keys", "rows.repair")
ROWS_AT_ONCE = 2000


def answer_rows(method: str, args: Mapping[str, Any], dsn: str, profile: Profile) -> Iterator[Piece]:
    """Return the pieces that answer a call; they are made in another thread.

    Raises:
        ProtocolError: when the call asks for what cannot be.
    """
    match method, args:
        case "rows.tables", _:
            return _tables(dsn, profile)
        case "rows.sums", {"table": [bytes(schema), bytes(name)], "chunks": int(chunks), "share": int(share)}:
            _check(1 <= chunks <= MAX_CHUNKS and 1 <= share <= 100, args)
            return _sums(dsn, profile, (schema, name), chunks, share)
        case "rows.keys", {"table": [bytes(schema), bytes(name)], "chunks": int(chunks), "wanted": list(wanted)}:
            _check(1 <= chunks <= MAX_CHUNKS and all(type(each) is int and 0 <= each < chunks for each in wanted), args)
            return _keys(dsn, profile, (schema, name), chunks, wanted)
        case "rows.repair", {"tables": [_, *_] as tables, "origin": int(origin)}:
            _check(all(isinstance(each, list) and len(each) == 2 for each in tables), args)
            return _repair(dsn, profile, [(schema, name) for schema, name in tables], origin)
        case _:
            raise ProtocolError(f"{method} was called with {args!r:.100}")


def _check(holds: bool, args: Mapping[str, Any]) -> None:
    if not holds:
        raise ProtocolError(f"rows were asked for with {args!r:.100}")


def _tables(dsn: str, profile: Profile) -> Iterator[Piece]:
    with checking(dsn) as connection:
        tables = compared_tables(connection, profile)
    found = [[each.table.schema, each.table.name, each.chunks, each.estimate] for each in tables]
    for start in range(0, len(found), ROWS_AT_ONCE):
        yield {"kind": "tables"}, msgpack.packb(found[start : start + ROWS_AT_ONCE], use_bin_type=True)
    yield {"kind": "result", "tables": len(found)}, None


def _sums(dsn: str, profile: Profile, key: tuple[bytes, bytes], chunks: int, share: int) -> Iterator[Piece]:
    with checking(dsn) as connection:
        table = _find(compared_tables(connection, profile), key)
        begun = time.monotonic()
        sums = chunk_sums(connection, table, chunks)
        took = time.monotonic() - begun
    # Numeric sums may be longer than an integer of MessagePack.
    rows = [[chunk, count, str(total)] for chunk, (count, total) in sums.items()]
    yield {"kind": "sums"}, msgpack.packb(rows, use_bin_type=True)
    # The server has so much time for others as was asked for.
    time.sleep(took * (100 / share - 1))
    yield {"kind": "result", "rows": sum(count for count, _ in sums.values())}, None


def _keys(dsn: str, profile: Profile, key: tuple[bytes, bytes], chunks: int, wanted: list[int]) -> Iterator[Piece]:
    rows: dict[bytes, Row] = {}
    with checking(dsn) as connection:
        table = _find(compared_tables(connection, profile), key)
        if wanted:
            rows = rows_in_chunks(connection, table, chunks, wanted)
    listed = [[name, *row] for name, row in rows.items()]
    size, piece = 0, []
    for each in listed:
        piece.append(each)
        size += len(each[0]) + 100
        if size > 512 << 10:
            yield {"kind": "rows"}, msgpack.packb(piece, use_bin_type=True)
            size, piece = 0, []
    yield {"kind": "rows"}, msgpack.packb(piece, use_bin_type=True)
    yield {"kind": "result", "rows": len(listed)}, None


def _repair(dsn: str, profile: Profile, keys: list[tuple[bytes, bytes]], origin: int) -> Iterator[Piece]:
    with checking(dsn) as connection:
        tables = compared_tables(connection, profile)
    for key in keys:
        _find(tables, key)
    fetch_again(dsn, origin, set(keys))
    yield {"kind": "result"}, None


def _find(tables: list[Compared], key: tuple[bytes, bytes]) -> Compared:
    for each in tables:
        if (each.table.schema, each.table.name) == key:
            return each
    name = ".".join(part.decode(errors="backslashreplace") for part in key)
    raise ProtocolError(f"this node has no table {name} that is kept the same")
