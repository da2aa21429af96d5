"""Snapshots: the whole database, or what one origin answers for, with the vector that fits it, as a stream of pieces.

The pieces are those of PROTOCOL.md, section 4. A piece `wait` says that something is being waited for; the last piece,
`result`, has what the call returns. Nothing is kept in memory but a few chunks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions

from pmgsync.core.owners import Writers
from pmgsync.core.policies import counts_wholly
from pmgsync.core.positions import LAST, parse_lsn
from pmgsync.core.profile import Policy, Profile, TableRule
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.catalog import (
    Table,
    as_bytes,
    as_text,
    list_sequences,
    list_tables,
    synchronised,
)
from pmgsync.postgres.copy.copy_stream import CHUNK_BYTES, CopyOut
from pmgsync.postgres.copy.dump import SchemaBusyError, dump_schema
from pmgsync.postgres.copy.exported import (
    ExportedSnapshot,
    SnapshotChangedError,
    estimated_size,
    export_snapshot,
    hold_tables,
    open_snapshot_session,
)
from pmgsync.postgres.names import PUBLICATION
from pmgsync.postgres.pg_dump import find_pg_dump
from pmgsync.postgres.session import quote_ident, quote_literal

log = logging.getLogger(__name__)

Piece = tuple[dict[str, Any], bytes | None]
Vector = dict[int, list[int]]
Connection = psycopg2.extensions.connection
TRIES = 5


def take_database_snapshot(dsn: str, profile: Profile, *, own: tuple[int, int]) -> Iterator[Piece]:
    """Yield the pieces of a snapshot of the whole database: schema, rows, sequences.

    Rows of local and unlogged tables are left out, as are local columns: they get their defaults where it is restored.

    Args:
        own: CID and incarnation of this node's chain.

    Raises:
        PmgsyncError: when it cannot be taken; it is begun anew by itself when a table changes under it.
    """
    return retried(lambda: _take_database(dsn, profile, own))


def take_chain_snapshot(
    dsn: str,
    profile: Profile,
    *,
    origin: int,
    own: tuple[int, int],
    master: int,
    members: Collection[int],
    tables: Collection[tuple[bytes, bytes]] | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of a snapshot of the rows that one origin answers for, with its position alone.

    Args:
        origin: this node, or any other whose chain it has applied.
        own: CID and incarnation of this node's chain.
        master: the master's CID; it answers for rows of nodes that are gone.
        members: the CIDs of all members.
        tables: schema and name of the tables that are wanted; None: all.

    Raises:
        PmgsyncError: when it cannot be taken.
    """
    return retried(lambda: _take_chain(dsn, profile, origin, own, master, members, tables))


def retried(take: Callable[[], Generator[Piece, None, None]]) -> Iterator[Piece]:
    """Begin anew when a table changes before the first piece that counts; from then on every table is locked."""
    for attempt in range(1, TRIES + 1):
        sent = False
        try:
            with contextlib.closing(_guarded(take())) as pieces:
                for piece in pieces:
                    sent = sent or piece[0]["kind"] != "wait"
                    yield piece
            return
        except (SnapshotChangedError, SchemaBusyError) as error:
            log.warning("action=snapshot-again attempt=%d error=%s", attempt, error)
            if sent or attempt == TRIES:
                raise
            yield {"kind": "wait"}, None


def _guarded(pieces: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
    """Pass pieces on; errors of the server become this project's, and closing it closes everything."""
    with contextlib.closing(pieces):
        try:
            yield from pieces
        except (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedColumn) as error:
            raise SnapshotChangedError(f"a table was altered while it was to be read ({_line(error)})") from error
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            raise UnreachableError(f"the database did not answer ({_line(error)})") from error
        except psycopg2.Error as error:
            raise PmgsyncError(f"the database could not be read ({_line(error)})") from error


def _export(dsn: str) -> Generator[Piece, None, ExportedSnapshot]:
    waiting = export_snapshot(dsn)
    with contextlib.closing(waiting):
        while True:
            try:
                yield wait_piece(next(waiting))
            except StopIteration as end:
                snapshot = end.value
                assert isinstance(snapshot, ExportedSnapshot)
                return snapshot


def wait_piece(text: str) -> Piece:
    """Return the piece that says what is waited for."""
    return {"kind": "wait", "for": text}, None


def _take_database(dsn: str, profile: Profile, own: tuple[int, int]) -> Generator[Piece, None, None]:
    snapshot = yield from _export(dsn)
    with contextlib.ExitStack() as stack:
        stack.callback(snapshot.close)
        connection = open_snapshot_session(dsn, snapshot.name)
        stack.callback(connection.close)
        program = find_pg_dump(connection.server_version // 10000)
        # Before the tables are locked: pg_dump's locks could queue up behind someone who waits for ours.
        schema = {}
        for section in ("pre-data", "post-data"):
            dumping = dump_schema(dsn, program, section=section, snapshot=snapshot.name)
            with contextlib.closing(dumping):
                while section not in schema:
                    try:
                        next(dumping)
                        yield wait_piece("the schema")
                    except StopIteration as end:
                        schema[section] = end.value
        tables = [(table, rule) for table in list_tables(connection) if (rule := _database_rule(table, profile))]
        for text in hold_tables(connection, dsn, [table for table, _ in tables]):
            yield wait_piece(text)
        yield _plan(connection, [table for table, _ in tables]), None
        yield from _schema("pre-data", schema["pre-data"])
        counts = [0, 0]
        for table, rule in tables:
            yield from table_rows(connection, table, table.copied(rule.local_columns), None, counts)
        yield from _schema("post-data", schema["post-data"])
        for chunk in _chunks(_final_sql(connection, profile)):
            yield {"kind": "sequences"}, chunk
        vector = {own[0]: [own[1], snapshot.lsn, LAST]}
        vector |= {cid: place for cid, place in read_vector(connection).items() if cid != own[0]}
        yield _result(vector, counts), None


def _database_rule(table: Table, profile: Profile) -> TableRule | None:
    """Return the rule by which a table is copied with the database, None when its rows stay behind."""
    schema, name = as_text(table.schema), as_text(table.name)
    rule = profile.rule_for(schema, name) or TableRule(schema, name, Policy.MIRROR)
    return None if rule.policy is Policy.LOCAL or table.persistence != b"p" else rule


def _take_chain(
    dsn: str,
    profile: Profile,
    origin: int,
    own: tuple[int, int],
    master: int,
    members: Collection[int],
    tables: Collection[tuple[bytes, bytes]] | None,
) -> Generator[Piece, None, None]:
    with contextlib.ExitStack() as stack:
        if origin == own[0]:
            snapshot = yield from _export(dsn)
            stack.callback(snapshot.close)
            connection = open_snapshot_session(dsn, snapshot.name)
            place = [own[1], snapshot.lsn, LAST]
        else:
            connection = open_snapshot_session(dsn, None)
            place = read_vector(connection).get(origin, [])
        stack.callback(connection.close)
        if not place:
            raise UnreachableError(f"node {own[0]} has applied nothing of the chain of node {origin}")
        chosen = []
        writers = Writers.at(origin, master, members)
        published = _published(connection)
        for table, rule in synchronised(list_tables(connection), profile):
            if tables is not None and (table.schema, table.name) not in tables:
                continue
            condition = chain_condition(rule, writers)
            if condition is not None and table.oid in published:
                chosen.append((table, rule, condition))
        for text in hold_tables(connection, dsn, [table for table, _, _ in chosen]):
            yield wait_piece(text)
        yield _plan(connection, [table for table, _, _ in chosen]), None
        counts = [0, 0]
        for table, rule, condition in chosen:
            yield from table_rows(connection, table, table.copied(rule.local_columns), condition or None, counts)
        yield _result({origin: place}, counts), None


def chain_condition(rule: TableRule, writers: Writers) -> bytes | None:
    """Return the SQL condition of the rows that an origin answers for: b"" for all of them, None for none.

    Of merge tables it is the whole table: any row may have been changed there.
    """
    if rule.policy is Policy.MERGE:
        return b""
    match counts_wholly(rule, writers):
        case True:
            return b""
        case False:
            return None
    assert rule.owner is not None
    return writers.condition(quote_ident(as_bytes(rule.owner)))


def read_vector(connection: Connection) -> Vector:
    """Return the positions that the database holds, as the session's transaction sees them."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT origin, incarnation, lsn::text, part FROM pmgsync.position")
        return {origin: [incarnation, parse_lsn(as_text(lsn)), part] for origin, incarnation, lsn, part in cursor}


def _published(connection: Connection) -> set[int]:
    """The tables whose changes this node sends: a table that was created later is no concern of the others' yet."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT t.relid::bigint FROM pg_publication AS p, pg_get_publication_tables(p.pubname) AS t "
            "WHERE p.pubname = %s",
            (PUBLICATION,),
        )
        return {oid for (oid,) in cursor.fetchall()}


_ROLES = """
SELECT DISTINCT r.rolname FROM pg_shdepend AS d JOIN pg_roles AS r ON r.oid = d.refobjid
WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype IN ('o', 'a', 'r', 'i')
  AND d.dbid IN (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_DATABASE_SETTINGS = """
SELECT unnest(s.setconfig) FROM pg_db_role_setting AS s JOIN pg_database AS d ON d.oid = s.setdatabase
WHERE d.datname = current_database() AND s.setrole = 0
"""


def _plan(connection: Connection, tables: Sequence[Table]) -> dict[str, Any]:
    """Return the plan: estimates, and what the receiving server must have or be told: roles, settings, owner."""
    with connection.cursor() as cursor:
        cursor.execute(_ROLES)
        roles = [name for (name,) in cursor.fetchall()]
        cursor.execute(_DATABASE_SETTINGS)
        settings = [setting for (setting,) in cursor.fetchall()]
        cursor.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
        owner = cursor.fetchone()
        assert owner is not None
    return {
        "kind": "plan", "tables": len(tables), **estimated_size(connection, tables),
        "roles": roles, "settings": settings, "owner": owner[0],
    }  # fmt: skip


def _schema(section: str, sql: bytes) -> Iterator[Piece]:
    for chunk in _chunks(sql):
        yield {"kind": "schema", "section": section}, chunk


def _chunks(sql: bytes) -> Iterator[bytes]:
    """Yield the bytes in pieces that fit into a message, at least one; whoever takes them puts them together again."""
    for start in range(0, max(len(sql), 1), CHUNK_BYTES):
        yield sql[start : start + CHUNK_BYTES]


def table_rows(
    connection: Connection, table: Table, columns: Sequence[bytes], condition: bytes | None, counts: list[int]
) -> Iterator[Piece]:
    """Yield the pieces of one table; `counts` are the rows and bytes so far, and grow.

    Args:
        condition: SQL of the rows that are wanted; None: all.

    Raises:
        psycopg2.Error: when the server ends it.
    """
    yield {
        "kind": "table", "schema": table.schema, "table": table.name, "columns": list(columns)
    }, None  # fmt: skip
    listed = b", ".join(map(quote_ident, columns))
    source = b"(SELECT %s FROM ONLY %s%s)" % (listed, table.quoted, b" WHERE " + condition if condition else b"")
    copying = CopyOut(connection, b"COPY %s TO STDOUT (FORMAT text)" % source)
    rows = 0
    try:
        for chunk in copying:
            # In text format a line end is the end of a row: within a value it is written as \\n.
            rows += chunk.count(b"\n")
            counts[1] += len(chunk)
            yield {"kind": "rows"}, chunk
    finally:
        copying.close()
    counts[0] += rows
    yield {"kind": "table-end", "rows": rows}, None


def _final_sql(connection: Connection, profile: Profile) -> bytes:
    """Return what sets the sequences, those of local columns aside, and what `create` changed on this node's tables."""
    statements = []
    with connection.cursor() as cursor:
        for sequence in list_sequences(connection) if profile.sequences else ():
            if sequence.owner is not None:
                schema, table, column = map(as_text, sequence.owner)
                rule = profile.rule_for(schema, table)
                if rule is not None and column in rule.local_columns:
                    continue
            # Read now and not as of the snapshot, which sequences do not follow: later is safe, earlier is not.
            cursor.execute(b"SELECT last_value, is_called FROM %s" % sequence.quoted)
            row = cursor.fetchone()
            assert row is not None
            name = quote_literal(sequence.quoted)
            called = b"true" if row[1] else b"false"
            statements.append(b"SELECT pg_catalog.setval(%s::regclass, %d, %s);\n" % (name, row[0], called))
        cursor.execute("SELECT schema, name, identity::text, index FROM pmgsync.replica_identity")
        for row in cursor.fetchall():
            values = b", ".join(map(quote_literal, row))
            statements.append(
                b"INSERT INTO pmgsync.replica_identity (schema, name, identity, index) VALUES (%s);\n" % values
            )
    return b"".join(statements)


def _result(vector: Mapping[int, list[int]], counts: Sequence[int]) -> dict[str, Any]:
    return {"kind": "result", "vector": dict(vector), "rows": counts[0], "bytes": counts[1]}


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
