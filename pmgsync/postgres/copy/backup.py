"""Backups of the database: the profile's tables at one snapshot, as pieces; nothing of the cluster is among them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg2.extensions

from pmgsync.core.profile import InBackup, Profile
from pmgsync.postgres.catalog import Sequence, Table, as_bytes, as_text, list_sequences, list_tables, synchronised
from pmgsync.postgres.copy.exported import estimated_size, hold_tables, open_snapshot_session
from pmgsync.postgres.copy.take import Piece, retried, table_rows, wait_piece

Connection = psycopg2.extensions.connection


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a backup says of the database it is of; `server` is `server_version_num`."""

    database: bytes
    encoding: str
    server: int


def server_facts(connection: Connection) -> ServerFacts:
    """Return what a session's database is.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database(), current_setting('server_encoding')")
        row = cursor.fetchone()
        assert row is not None
    return ServerFacts(as_bytes(row[0]), as_text(row[1]), connection.server_version)


def take_backup(dsn: str, profile: Profile, *, statistics: bool) -> Iterator[Piece]:
    """Yield pieces: `plan`, then tables, rows and `sequences` as `pmgsync.core.backups` has them; `wait` in between.

    The plan has `facts` (`ServerFacts`), estimates of `rows` and `bytes`, and the names `left_out`. Columns that each
    node makes for itself are included, other than in a snapshot for another node: it is this database that is saved.

    Raises:
        PmgsyncError: when it cannot be taken; it is begun anew by itself when a table changes under it.
    """
    return retried(lambda: _take(dsn, profile, statistics))


def _take(dsn: str, profile: Profile, statistics: bool) -> Generator[Piece, None, None]:
    wanted: set[InBackup] = {"always", "statistics"} if statistics else {"always"}
    with contextlib.closing(open_snapshot_session(dsn, None)) as connection:
        candidates = synchronised(list_tables(connection), profile)
        tables = [table for table, rule in candidates if rule.backup in wanted]
        left_out = [(table.label, rule.backup) for table, rule in candidates if rule.backup not in wanted]
        for text in hold_tables(connection, dsn, tables):
            yield wait_piece(text)
        size, facts = estimated_size(connection, tables), server_facts(connection)
        yield {"kind": "plan", "facts": facts, "left_out": left_out, **size}, None
        counts = [0, 0]
        for table in tables:
            yield from table_rows(connection, table, table.copied(), None, counts)
        values = [_value(connection, each) for each in _sequences_of(connection, tables, everything=profile.all_tables)]
        yield {"kind": "sequences", "values": values}, None


def _sequences_of(connection: Connection, tables: Collection[Table], *, everything: bool) -> Iterator[Sequence]:
    """Yield the sequences of these tables; when it is a backup of everything, those that belong to no table too."""
    names = {(table.schema, table.name) for table in tables}
    for sequence in list_sequences(connection):
        if everything if sequence.owner is None else sequence.owner[:2] in names:
            yield sequence


def _value(connection: Connection, sequence: Sequence) -> list[Any]:
    # Read now and not as of the snapshot, which sequences do not follow: later is safe, earlier is not.
    with connection.cursor() as cursor:
        cursor.execute(b"SELECT last_value, is_called FROM %s" % sequence.quoted)
        row = cursor.fetchone()
        assert row is not None
    return [sequence.schema, sequence.name, int(row[0]), bool(row[1])]
