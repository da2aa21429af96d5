"""The pieces of a snapshot, as both kinds of restore take them: what they may say, and the SQL that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmgsync.core.positions import LAST, MAX_LSN, format_lsn
from pmgsync.core.profile import OWN_SCHEMA
from pmgsync.errors import ProtocolError
from pmgsync.postgres.session import quote_ident, quote_literal


def table_label(schema: bytes, table: bytes) -> str:
    """Return a table's name as messages write it."""
    return (schema + b"." + table).decode(errors="backslashreplace")


def table_piece(piece: Mapping[str, Any]) -> tuple[bytes, bytes, list[bytes]]:
    """Return schema, table and columns of a piece.

    Raises:
        ProtocolError: when it does not have them.
    """
    match piece:
        case {"schema": bytes(schema), "table": bytes(table), "columns": [*columns]} if schema != OWN_SCHEMA.encode():
            if all(type(column) is bytes for column in columns):
                return schema, table, columns
    raise ProtocolError(f"the snapshot has a malformed table piece {piece!r:.200}")


def copy_from(quoted: bytes, columns: list[bytes], condition: bytes = b"", *, encoding: str = "") -> bytes:
    """Return the statement that takes rows of these columns in; of a table without columns, empty rows.

    Args:
        encoding: that the rows are in; "": the session's, and in SQL_ASCII any bytes are taken, into any database.
    """
    listed = b" (%s)" % b", ".join(map(quote_ident, columns)) if columns else b""
    where = b" WHERE " + condition if condition else b""
    option = b", ENCODING %s" % quote_literal(encoding.encode()) if encoding else b""
    return b"COPY %s%s FROM STDIN (FORMAT text%s)%s" % (quoted, listed, option, where)


def checked_vector(result: Mapping[str, Any]) -> dict[int, tuple[int, int, int]]:
    """Return the vector of a snapshot's result.

    Raises:
        ProtocolError: when it is not one.
    """
    vector: dict[int, tuple[int, int, int]] = {}
    given = result.get("vector")
    for origin, place in given.items() if isinstance(given, dict) else ():
        match place:
            case [int(incarnation), int(lsn), int(part)] if type(origin) is int and origin > 0:
                # 0: the chain of a node that was removed, which is over.
                if incarnation >= 0 and 0 <= lsn <= MAX_LSN and part == LAST:
                    vector[origin] = (incarnation, lsn, part)
                    continue
        raise ProtocolError(f"the snapshot's vector has the place {place!r:.80} for the origin {origin!r:.20}")
    if not vector:
        raise ProtocolError("the snapshot has no vector")
    return vector


def set_position(origin: int, incarnation: int, lsn: int, part: int) -> bytes:
    """Return the statement that sets the database's position on a chain."""
    return (
        b"INSERT INTO pmgsync.position (origin, incarnation, lsn, part) VALUES (%d, %d, '%s', %d) ON CONFLICT (origin) "
        b"DO UPDATE SET incarnation = excluded.incarnation, lsn = excluded.lsn, part = excluded.part, "
        b"commit_time = NULL" % (origin, incarnation, format_lsn(lsn).encode(), part)
    )
