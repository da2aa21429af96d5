"""Restoring a backup into the database that is there: its tables are replaced in one transaction, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions

from pmgsync.core.backups import Contents, SequenceValue, TableContent
from pmgsync.core.profile import Profile
from pmgsync.errors import MembershipError, PmgsyncError, UnreachableError
from pmgsync.postgres.apply.failures import one_line
from pmgsync.postgres.catalog import Table, as_text, list_sequences, list_tables, synchronised
from pmgsync.postgres.copy.backup import server_facts
from pmgsync.postgres.copy.copy_stream import CopyIn
from pmgsync.postgres.copy.pieces import copy_from
from pmgsync.postgres.session import connect, quote_ident, quote_literal
from pmgsync.postgres.setup.node_row import node_facts

LOCK_PATIENCE_S = 30
ANY_BYTES = "SQL_ASCII"
MAKE_IT = "see that the software whose database this is has made its tables"

Connection = psycopg2.extensions.connection


@dataclass
class Replacing:
    """What a restore would do to a database.

    Attributes:
        rows: of each table of the backup: how many rows it has now.
        notes: sentences about what differs and does no harm.
        problems: sentences about why it cannot be done, each with what can be done about it.
    """

    rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def compare_backup(dsn: str, profile: Profile, contents: Contents) -> Replacing:
    """Return what restoring a backup here would replace, and what stands against it; nothing is changed.

    Raises:
        MembershipError: when the database belongs to a cluster.
        UnreachableError: when the server does not answer.
    """
    about, found = contents.about, Replacing()
    assert about is not None
    with _session(dsn) as connection, _errors():
        here = server_facts(connection)
        if about.encoding != here.encoding:
            text = f"the backup is of a database in {about.encoding}, this one is in {here.encoding}"
            if about.encoding == ANY_BYTES:
                found.notes.append(f"{text}: a text whose bytes it does not take ends the restore, without a change")
            elif here.encoding == ANY_BYTES:
                found.notes.append(f"{text}: texts are kept as the bytes that they are")
            else:
                remedy = f"make the database anew in {about.encoding}"
                found.problems.append((f"{text}: texts would come out wrong", remedy))
        if about.server // 10000 != here.server // 10000:
            found.notes.append(f"the backup is from PostgreSQL {about.server // 10000}, here is {here.server // 10000}")
        tables = _synchronised(connection, profile)
        for content in contents.tables:
            table = tables.get((content.schema, content.name))
            if table is None:
                text = f"there is no table {content.label} here that the profile has synchronised"
                found.problems.append((text, f"{MAKE_IT}, and that the profile is {about.profile}"))
                continue
            _compare_columns(content, table, found)
            with connection.cursor() as cursor:
                cursor.execute(b"SELECT count(*) FROM ONLY %s" % table.quoted)
                row = cursor.fetchone()
                assert row is not None
                found.rows[content.label] = int(row[0])
        there = {(each.schema, each.name) for each in list_sequences(connection)}
        for sequence in contents.sequences:
            if (sequence.schema, sequence.name) not in there:
                found.problems.append((f"there is no sequence {_label(sequence)} here", MAKE_IT))
    return found


def _compare_columns(content: TableContent, table: Table, found: Replacing) -> None:
    here = table.copied()
    lacking = [column for column in content.columns if column not in here]
    more = [column for column in here if column not in content.columns]
    if lacking:
        problem = f"the table {content.label} lacks columns here: {_names(lacking)}"
        found.problems.append((problem, "install the version of the software that made the backup, or a later one"))
    if more:
        found.notes.append(
            f"columns of {content.label} that the backup does not have get their defaults: {_names(more)}"
        )


class BackupRestore:
    """Takes the pieces of a backup's tables: `feed` each one, `finish`; `close` in any case.

    Nothing is visible before `finish`, and without it nothing happened. Triggers do not fire; foreign keys are checked
    at the end, so that a table which the backup does not have is left with no reference into the void.

    Attributes:
        rows, bytes: how much has been fed.
    """

    def __init__(self, dsn: str, profile: Profile, contents: Contents) -> None:
        """Begin the transaction, and empty the backup's tables in it.

        Raises:
            MembershipError: when the database belongs to a cluster.
            UnreachableError: when the server does not answer, or a table stays in use.
        """
        self.rows = self.bytes = 0
        self._copy: CopyIn | None = None
        self._contents = contents
        self._table: Table | None = None
        self._stack = contextlib.ExitStack()
        try:
            self._connection = self._stack.enter_context(_session(dsn))
            with _errors():
                self._execute(b"SET LOCAL lock_timeout = '%ds'" % LOCK_PATIENCE_S)
                self._encoding = server_facts(self._connection).encoding
                self._tables = _synchronised(self._connection, profile)
                self._replaced = [self._tables[table.schema, table.name] for table in contents.tables]
                self._empty()
        except BaseException:
            self.close()
            raise

    def feed(self, piece: Mapping[str, Any], attachment: bytes | None) -> None:
        """Take the next piece; what may stand where, `Contents` has checked.

        Raises:
            PmgsyncError: when the server refuses it.
        """
        data = attachment or b""
        with _errors(self._table):
            match piece["kind"]:
                case "table":
                    self._table = self._tables[piece["schema"], piece["table"]]
                    taking = copy_from(self._table.quoted, piece["columns"], encoding=self._encoding)
                    self._copy = CopyIn(self._connection, taking)
                case "rows":
                    assert self._copy is not None
                    self._copy.feed(data)
                    self.rows += data.count(b"\n")
                    self.bytes += len(data)
                case "table-end":
                    assert self._copy is not None
                    copied = self._copy.finish()
                    self._copy = None
                    if copied != piece["rows"]:
                        raise PmgsyncError(f"{copied} of {piece['rows']} rows were taken")
                    self._table = None

    def finish(self) -> None:
        """Set the sequences, check foreign keys, and commit.

        Raises:
            PmgsyncError: when rows refer to rows that there are not; nothing was changed.
        """
        with _errors():
            for sequence in self._contents.sequences:
                self._set(sequence)
            self._check_references()
            self._execute(b"COMMIT")

    def close(self) -> None:
        """End the session; without `finish` everything is rolled back."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        self._stack.close()

    def _empty(self) -> None:
        if not self._replaced:
            return
        self._execute(b"SAVEPOINT empty")
        try:
            self._execute(b"TRUNCATE TABLE ONLY " + b", ONLY ".join(table.quoted for table in self._replaced))
        except psycopg2.errors.FeatureNotSupported:
            # A table that stays refers to one of them.
            self._execute(b"ROLLBACK TO SAVEPOINT empty")
            for table in self._replaced:
                self._execute(b"LOCK TABLE ONLY %s IN EXCLUSIVE MODE" % table.quoted)
                self._execute(b"DELETE FROM ONLY %s" % table.quoted)

    def _set(self, sequence: SequenceValue) -> None:
        name = quote_ident(sequence.schema) + b"." + quote_ident(sequence.name)
        # setval alone is not undone by a rollback; on what RESTART has made in this transaction it is.
        self._execute(b"ALTER SEQUENCE %s RESTART" % name)
        called = b"true" if sequence.called else b"false"
        self._execute(b"SELECT pg_catalog.setval(%s::regclass, %d, %s)" % (quote_literal(name), sequence.value, called))

    def _check_references(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(_REFERENCES, {"oids": [table.oid for table in self._replaced]})
            constraints = cursor.fetchall()
            for name, child, parent, pairs, present in constraints:
                cursor.execute(
                    b"SELECT count(*) FROM %s AS c WHERE %s AND NOT EXISTS (SELECT FROM %s AS p WHERE %s)"
                    % (child, present, parent, pairs)
                )
                ((count,),) = cursor.fetchall()
                if count:
                    raise PmgsyncError(
                        f"{count} rows of {as_text(child)} would refer to rows of {as_text(parent)} that there are not "
                        f"(foreign key {as_text(name)})",
                        hint="the backup does not have one of the two tables; empty that one, or take a backup that "
                        "has both",
                    )

    def _execute(self, statement: bytes) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)


# Foreign keys from or to these tables, or tables that these are partitions of; those of partitions are their parents'.
_REFERENCES = """
WITH touched AS (
    SELECT t.oid FROM unnest(%(oids)s::oid[]) AS t (oid)
    UNION SELECT a.relid::oid FROM unnest(%(oids)s::oid[]) AS t (oid), pg_partition_ancestors(t.oid) AS a
)
SELECT c.conname, c.conrelid::regclass::text, c.confrelid::regclass::text,
       (SELECT string_agg(format('p.%%I = c.%%I', pa.attname, ca.attname), ' AND ')
        FROM unnest(c.conkey, c.confkey) AS k (ca, pa)
        JOIN pg_attribute AS ca ON ca.attrelid = c.conrelid AND ca.attnum = k.ca
        JOIN pg_attribute AS pa ON pa.attrelid = c.confrelid AND pa.attnum = k.pa),
       (SELECT string_agg(format('c.%%I IS NOT NULL', ca.attname), ' AND ')
        FROM unnest(c.conkey) AS k (ca) JOIN pg_attribute AS ca ON ca.attrelid = c.conrelid AND ca.attnum = k.ca)
FROM pg_constraint AS c
WHERE c.contype = 'f' AND c.conparentid = 0 AND c.convalidated
  AND (c.conrelid IN (SELECT oid FROM touched) OR c.confrelid IN (SELECT oid FROM touched))
ORDER BY c.conname
"""


@contextlib.contextmanager
def _session(dsn: str) -> Iterator[Connection]:
    """Yield a session in a transaction, on a database that is in no cluster."""
    with contextlib.closing(connect(dsn, application_name="pmgcm restore", replica=True)) as connection:
        connection.autocommit = True
        with _errors():
            if node_facts(connection) is not None:
                raise MembershipError(
                    "this node's database belongs to a cluster, which would go on from other rows than it has sent",
                    hint="restore on a node that is in no cluster; `pmgcm leave` takes this one out of its cluster",
                )
            connection.cursor().execute("BEGIN")
        yield connection


@contextlib.contextmanager
def _errors(table: Table | None = None) -> Iterator[None]:
    where = f" at the table {table.label}" if table is not None else ""
    try:
        yield
    except psycopg2.errors.LockNotAvailable as error:
        raise UnreachableError(
            f"a table stays in use ({one_line(error)})", hint="stop what reads or writes this database, and try again"
        ) from error
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the database did not answer{where} ({one_line(error)})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(f"the server does not take the backup{where} ({one_line(error)})") from error


def _synchronised(connection: Connection, profile: Profile) -> dict[tuple[bytes, bytes], Table]:
    return {(table.schema, table.name): table for table, _ in synchronised(list_tables(connection), profile)}


def _names(columns: Collection[bytes]) -> str:
    return ", ".join(column.decode(errors="backslashreplace") for column in columns)


def _label(sequence: SequenceValue) -> str:
    return (sequence.schema + b"." + sequence.name).decode(errors="backslashreplace")
