"""Restoring a database from a snapshot: built beside the old one under another name, put in its place when whole."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg2
import psycopg2.extensions

from pmgsync.errors import PmgsyncError, PreflightError, ProtocolError, UnreachableError
from pmgsync.postgres import sql
from pmgsync.postgres.catalog import as_bytes, as_text
from pmgsync.postgres.copy.chain_restore import ChainRestore
from pmgsync.postgres.copy.copy_stream import CopyIn
from pmgsync.postgres.copy.databases import (
    NEW_SUFFIX,
    OLD_SUFFIX,
    PATIENCE_S,
    as_sql,
    clear_leftovers,
    drop,
    exists,
    literal,
    maintenance,
    quoted,
    terminate_sessions,
)
from pmgsync.postgres.copy.pieces import checked_vector, copy_from, set_position, table_label, table_piece
from pmgsync.postgres.session import connect, quote_ident, quote_literal

__all__ = ["ChainRestore", "DatabaseRestore"]

log = logging.getLogger(__name__)

NAME_BYTES = 63

Connection = psycopg2.extensions.connection


# Over 250 lines: the life of one new database, from its making to the swap, and each step needs what came before.
class DatabaseRestore:
    """Makes the database of a dsn anew from the pieces of a snapshot.

    `begin`, `feed` each piece, `finish`, `swap`; `abandon` at any time. Until `swap` the old database is not touched.
    Interrupted at any instant, the old database or the whole new one is there under its name, and the next `begin`
    clears away the rest.

    Attributes:
        rows, bytes: how much has been fed.
        plan: what the sender said it would be; empty before.
    """

    def __init__(self, dsn: str, facts: Mapping[str, Any]) -> None:
        """Prepare; nothing is done yet.

        Args:
            dsn: of the database that is to be replaced; it need not exist.
            facts: of the database that the snapshot is taken of, as `database_facts` gives them.
        """
        parameters = psycopg2.extensions.parse_dsn(dsn)
        self.name: str = parameters.get("dbname") or parameters.get("user") or "postgres"
        if len(self.name.encode()) > NAME_BYTES - len(NEW_SUFFIX):
            raise PreflightError(
                f"the name of the database {self.name} is too long to make another one beside it",
                hint=f"use a name of at most {NAME_BYTES - len(NEW_SUFFIX)} bytes",
            )
        self.rows = self.bytes = 0
        self.plan: Mapping[str, Any] = {}
        self._dsn = dsn
        self._facts = facts
        self._connection: Connection | None = None
        self._copy: CopyIn | None = None
        self._table = ""
        self._sql = b""
        self._section = ""
        self._complete = False

    @property
    def dsn(self) -> str:
        """Of the new database, as long as it is beside the old one; `provision` may work on it before the swap."""
        return str(psycopg2.extensions.make_dsn(self._dsn, dbname=self.name + NEW_SUFFIX))

    def progress(self) -> dict[str, Any]:
        """Return how far it is: phase, bytes, rows, and the bytes that are expected. May be called from any thread."""
        plan = self.plan.get("bytes", 0)
        return {"phase": "copying", "bytes": self.bytes, "rows": self.rows, "bytes_total": plan}

    def begin(self) -> None:
        """Clear away what an interrupted run left, and make the new database, empty.

        Raises:
            PreflightError: when this server cannot have such a database.
        """
        with self._maintenance() as cursor:
            clear_leftovers(cursor, self.name)
            self._create(cursor)
        self._connection = connect(self.dsn, application_name="pmgsync restore", replica=True)
        self._connection.autocommit = True
        # The swap's commit makes durable what came before it; single commits need not wait for the disk.
        self._execute(b"SET synchronous_commit = off")
        self._execute(b"SET maintenance_work_mem = '256MB'")
        # First: triggers of the gateway's tables may call functions of it.
        # The watch's and the guard's, too: a dump has their triggers, which do nothing until the node is provisioned.
        for name in ("schema.sql", "apply.sql", "emit.sql", "watch.sql", "ddl.sql", "guard.sql"):
            self._execute(sql.script(name))

    def feed(self, piece: Mapping[str, Any], attachment: bytes | None) -> None:
        """Take the next piece.

        Raises:
            ProtocolError: when it cannot stand here.
            PreflightError: when this server lacks something that the snapshot needs.
            PmgsyncError: when the server refuses it.
        """
        kind, data = piece.get("kind"), attachment or b""
        with self._errors():
            # An SQL text that is longer than a message comes in several pieces.
            section = f"{kind} {piece.get('section', '')}"
            if self._sql and kind != "wait" and section != self._section:
                self._run_sql()
            match kind:
                case "wait":
                    pass
                case "plan":
                    self.plan = dict(piece)
                    self._take_plan(piece)
                case "schema" | "sequences":
                    self._section = section
                    self._sql += data
                    self.bytes += len(data)
                case "table":
                    self._begin_table(piece)
                case "rows" if self._copy is not None:
                    self._copy.feed(data)
                    self.bytes += len(data)
                    self.rows += data.count(b"\n")
                case "table-end" if self._copy is not None:
                    copied, self._copy = self._copy.finish(), None
                    if copied != piece.get("rows"):
                        raise ProtocolError(
                            f"the snapshot announced {piece.get('rows')} rows of {self._table}, got {copied}"
                        )
                case _:
                    raise ProtocolError(f"the snapshot has a piece {kind!r:.40} where none can stand")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note the vector that belongs to the snapshot; the new database is complete with it.

        Raises:
            ProtocolError: when something is missing.
        """
        vector = checked_vector(result)
        with self._errors():
            if self._sql:
                self._run_sql()
            if self._copy is not None or not self.plan or result.get("rows") != self.rows:
                raise ProtocolError(f"the snapshot ended after {self.rows} of {result.get('rows')} rows")
            for origin, (incarnation, lsn, part) in vector.items():
                self._execute(set_position(origin, incarnation, lsn, part))
            self._execute(b"ANALYZE")
        self._complete = True

    def swap(self) -> None:
        """Put the new database in the old one's place: both renames are one transaction. Sessions on the old one end.

        Raises:
            UnreachableError: when the old one stays in use; both databases are as before.
        """
        assert self._complete
        self._close()
        new, old = self.name + NEW_SUFFIX, self.name + OLD_SUFFIX
        deadline = time.monotonic() + PATIENCE_S
        with self._maintenance() as cursor:
            while True:
                terminate_sessions(cursor, self.name, new)
                try:
                    cursor.execute("BEGIN")
                    if exists(cursor, self.name):
                        cursor.execute(as_sql(f"ALTER DATABASE {quoted(self.name)} RENAME TO {quoted(old)}"))
                    cursor.execute(as_sql(f"ALTER DATABASE {quoted(new)} RENAME TO {quoted(self.name)}"))
                    cursor.execute("COMMIT")
                    break
                except psycopg2.errors.ObjectInUse as error:
                    cursor.execute("ROLLBACK")
                    if time.monotonic() > deadline:
                        raise UnreachableError(
                            f"the database {self.name} stays in use ({_line(error)})",
                            hint="stop what connects to it again and again; prepared transactions count, too",
                        ) from error
            log.info("action=swapped database=%s rows=%d bytes=%d", self.name, self.rows, self.bytes)
            drop(cursor, old)

    def abandon(self) -> None:
        """Give up and remove the new database, whatever state it is in; after the swap this does nothing."""
        self._close()
        with self._maintenance() as cursor:
            drop(cursor, self.name + NEW_SUFFIX)

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _take_plan(self, plan: Mapping[str, Any]) -> None:
        """Check that the owners of what comes exist here, and give the database its settings and its owner."""
        wanted = [as_bytes(name) for name in plan.get("roles", ())]
        owner = plan.get("owner")
        with self._session().cursor() as cursor:
            cursor.execute("SELECT rolname FROM pg_roles")
            here = {as_bytes(name) for (name,) in cursor.fetchall()}
        missing = sorted(as_text(name) for name in wanted if name not in here and not name.startswith(b"pg_"))
        if missing:
            raise PreflightError(
                f"roles that own or may use something in the database are not on this server: {', '.join(missing)}",
                hint="create them first: " + "; ".join(f'CREATE ROLE "{name}"' for name in missing),
            )
        name = quote_ident((self.name + NEW_SUFFIX).encode())
        for setting in plan.get("settings", ()):
            key, _, value = as_bytes(setting).partition(b"=")
            # Lists such as search_path are stored as they are to be written, other values without their quotes.
            listed = key in {b"search_path", b"temp_tablespaces", b"session_preload_libraries", b"DateStyle"}
            written = value if listed else quote_literal(value)
            self._execute(b"ALTER DATABASE %s SET %s TO %s" % (name, quote_ident(key), written))
        if owner is not None and as_bytes(owner) in here:
            self._execute(b"ALTER DATABASE %s OWNER TO %s" % (name, quote_ident(as_bytes(owner))))

    def _begin_table(self, piece: Mapping[str, Any]) -> None:
        if self._copy is not None:
            raise ProtocolError("the snapshot begins a table within another")
        schema, table, columns = table_piece(piece)
        self._table = table_label(schema, table)
        name = quote_ident(schema) + b"." + quote_ident(table)
        self._copy = CopyIn(self._session(), copy_from(name, columns))

    def _run_sql(self) -> None:
        sql, self._sql = self._sql, b""
        self._execute(sql)
        # A dump sets what it needs for itself: the search path, row security and others.
        self._execute(b"RESET ALL; SET session_replication_role = replica; SET synchronous_commit = off")
        self._execute(b"SET maintenance_work_mem = '256MB'")

    # -- databases -----------------------------------------------------------------------------------------------------

    def _create(self, cursor: psycopg2.extensions.cursor) -> None:
        facts = self._facts
        encoding, collate, ctype = (str(facts[key]) for key in ("encoding", "collate", "ctype"))
        statement = (
            f"CREATE DATABASE {quoted(self.name + NEW_SUFFIX)} TEMPLATE template0 ENCODING {literal(encoding)} "
            f"LC_COLLATE {literal(collate)} LC_CTYPE {literal(ctype)}"
        )
        version = cursor.connection.server_version
        provider, locale = str(facts.get("provider", "c")), str(facts.get("locale", ""))
        if provider == "i":
            statement += f" LOCALE_PROVIDER icu ICU_LOCALE {literal(locale)}"
            if facts.get("icu_rules") and version >= 160000:
                statement += f" ICU_RULES {literal(str(facts['icu_rules']))}"
        elif provider == "b":
            statement += f" LOCALE_PROVIDER builtin BUILTIN_LOCALE {literal(locale)}"
        elif version >= 150000:
            statement += " LOCALE_PROVIDER libc"
        try:
            cursor.execute(as_sql(statement))
        except (
            psycopg2.errors.WrongObjectType,
            psycopg2.errors.InvalidParameterValue,
            psycopg2.errors.SyntaxError,
            psycopg2.errors.FeatureNotSupported,
            psycopg2.errors.UndefinedObject,
            psycopg2.errors.InvalidObjectDefinition,
        ) as error:
            shown = f"{collate}, {locale}" if locale else collate
            raise PreflightError(
                f"this server cannot have a database of encoding {encoding} and locale {shown} ({_line(error)})",
                hint=f"install the locale {collate} on this machine (locale-gen) and restart PostgreSQL",
            ) from error

    @contextlib.contextmanager
    def _maintenance(self) -> Iterator[psycopg2.extensions.cursor]:
        """Yield a cursor in another database of the server."""
        with maintenance(self._dsn, self.name) as cursor:
            yield cursor

    def _session(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def _execute(self, sql: bytes) -> None:
        with self._session().cursor() as cursor:
            cursor.execute(sql)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg2.Error as error:
            where = f" at the table {self._table}" if self._copy is not None else ""
            kind = UnreachableError if isinstance(error, psycopg2.InterfaceError) else PmgsyncError
            raise kind(f"the snapshot cannot be restored{where} ({str(error).strip()})") from error

    def _close(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        if self._connection is not None:
            with contextlib.suppress(psycopg2.Error):
                self._connection.close()
            self._connection = None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
