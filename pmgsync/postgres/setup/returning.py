"""What a node does with its database after it has had changes that do not count: closing, and fetching what differs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import psycopg2
import psycopg2.extensions

from pmgsync.core.document import Fork
from pmgsync.core.membership import Member
from pmgsync.core.positions import format_lsn, parse_lsn
from pmgsync.core.profile import Policy, Profile
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.catalog import list_tables, synchronised
from pmgsync.postgres.session import connect, quote_literal, rows
from pmgsync.postgres.setup.guard import ensure_guard, old_snapshots
from pmgsync.postgres.setup.lease import LeaseSession
from pmgsync.postgres.wal.slot_reader import emit_barrier

log = logging.getLogger(__name__)

TableName = tuple[bytes, bytes]
PATIENCE_S = 1.0
REASON = "this node had changes of it that do not count any more"
_APPLICATION = "pmgsync divergence"


def close_to_writes(dsn: str, profile: Profile, master: Member, *, patient: bool) -> int:
    """Guard the tables of the master's, and return an LSN below which every commit is that was let through.

    What is open when the guard comes has to be over first: a trigger is made when nobody writes its table, and
    where triggers stand already an open transaction is refused at its commit.

    Args:
        patient: wait for transactions that may have a snapshot from before the guard, too: they do not see it.

    Raises:
        UnreachableError: when tables stay in use, statements do not end, or the server does not answer.
    """
    ensure_guard(dsn, profile, master=master, patience_s=PATIENCE_S)
    with contextlib.closing(LeaseSession(dsn)) as lease:
        if not lease.shut():
            raise UnreachableError("statements that write tables of the master's have not ended yet")
    if patient:
        with _session(dsn) as connection:
            if old := old_snapshots(connection):
                raise UnreachableError(f"{old} transactions that began before the guard may still write past it")
    return emit_barrier(dsn)


def mirrored_tables(dsn: str, profile: Profile) -> list[TableName]:
    """Return schema and name of the tables that only the master writes.

    Raises:
        UnreachableError: when the server does not answer.
    """
    with _session(dsn) as connection:
        tables = synchronised(list_tables(connection), profile)
    return [(table.schema, table.name) for table, rule in tables if rule.policy is Policy.MIRROR]


def positions(dsn: str) -> Mapping[int, tuple[int, int]]:
    """Return how far this database has applied each chain: origin → incarnation and LSN.

    Raises:
        UnreachableError: when the server does not answer.
    """
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT origin, incarnation, lsn::text FROM pmgsync.position")
        found = rows(cursor)
    return {int(origin or 0): (int(life or 0), parse_lsn((lsn or b"").decode())) for origin, life, lsn in found}


def incomplete_tables(dsn: str, origin: int) -> list[str]:
    """Return the names of tables of which something of an origin's chain is left out here.

    Raises:
        UnreachableError: when the server does not answer.
    """
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT schema, name FROM pmgsync.stale_table WHERE origin = %s AND kind <> 'none' ORDER BY 1, 2", (origin,)
        )
        found = rows(cursor)
    return [b".".join(part or b"" for part in table).decode(errors="backslashreplace") for table in found]


def fetch_from_master(
    dsn: str,
    master: int,
    tables: Collection[TableName],
    *,
    before: int = 0,
    after: int = 0,
    forks: Mapping[int, Fork] = MappingProxyType({}),
    reason: str = REASON,
) -> None:
    """Have tables fetched anew from the master, whose changes of them are left out until then.

    Args:
        tables: schema and name.
        before: CID of a master before whose chain had more here than counts, and was left out in part; 0: none.
        after: LSN on that chain up to which it counts.
        forks: masters before, and where on their chains the master's copy has everything. What is still to come of
            them up to there must not meet rows that are to be replaced.

    Raises:
        UnreachableError: when the server does not answer.
    """
    if not tables:
        return
    listed = b", ".join(b"(%s, %s)" % (quote_literal(schema), quote_literal(name)) for schema, name in tables)
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(b"BEGIN")
        cursor.execute(
            b"INSERT INTO pmgsync.stale_table (origin, schema, name, kind, reason, lsn) "
            b"SELECT %d, t.schema::name, t.name::name, 'table', %s, '0/0' FROM (VALUES %s) AS t (schema, name) "
            b"ON CONFLICT (origin, schema, name) DO UPDATE SET kind = 'table', reason = EXCLUDED.reason"
            % (master, quote_literal(reason.encode()), listed)
        )
        if before:
            cursor.execute(
                b"UPDATE pmgsync.stale_table SET kind = 'none', until = '%s' WHERE origin = %d "
                b"AND (schema, name) IN (SELECT t.schema::name, t.name::name FROM (VALUES %s) AS t (schema, name))"
                % (format_lsn(after).encode(), before, listed)
            )
        for origin, fork in forks.items():
            cursor.execute(
                b"INSERT INTO pmgsync.stale_table AS s (origin, schema, name, kind, reason, lsn, until) "
                b"SELECT p.origin, t.schema::name, t.name::name, 'none', %s, '0/0', '%s' "
                b"FROM pmgsync.position AS p, (VALUES %s) AS t (schema, name) "
                b"WHERE p.origin = %d AND p.incarnation = %d AND p.lsn < '%s' "
                b"ON CONFLICT (origin, schema, name) DO UPDATE "
                b"SET kind = 'none', until = greatest(s.until, EXCLUDED.until)"
                % (
                    quote_literal(reason.encode()), format_lsn(fork.lsn).encode(), listed,
                    origin, fork.incarnation, format_lsn(fork.lsn).encode(),
                )
            )  # fmt: skip
        cursor.execute(b"COMMIT")
        _look_again(cursor, master, before, *forks)
    log.warning("action=fetch-from-master master=%d tables=%d reason=%s", master, len(tables), reason)


def publish_again(dsn: str, tables: Collection[TableName]) -> None:
    """Have all other nodes fetch tables from this one, the master: it has changes of them that are in no chain.

    Raises:
        UnreachableError: when the server does not answer.
    """
    if not tables:
        return
    listed = b", ".join(b"(%s, %s)" % (quote_literal(schema), quote_literal(name)) for schema, name in tables)
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            b"SELECT pmgsync.missing_content(pg_catalog.array_agg(t.relation)) FROM pmgsync.tables AS t "
            b"WHERE (t.schema, t.name) IN (SELECT v.schema::name, v.name::name FROM (VALUES %s) AS v (schema, name))"
            % listed
        )
    log.warning("action=publish-again tables=%d", len(tables))


def pass_chain(dsn: str, origin: int, lsn: int) -> None:
    """Note that nothing up to an LSN is to be applied of the chain of a node that is gone.

    Raises:
        UnreachableError: when the server does not answer.
    """
    with _session(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            "UPDATE pmgsync.position SET lsn = %s, part = 4294967295 WHERE origin = %s AND lsn < %s",
            (format_lsn(lsn), origin, format_lsn(lsn)),
        )


def _look_again(cursor: psycopg2.extensions.cursor, *origins: int) -> None:
    """End the sessions that apply these chains: they begin anew at once, and see what is noted."""
    names = [f"pmgsync apply {origin}" for origin in origins if origin]
    cursor.execute(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity "
        "WHERE datname = pg_catalog.current_database() AND application_name = ANY (%s)",
        (names,),
    )


@contextlib.contextmanager
def _session(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    try:
        with contextlib.closing(connect(dsn, application_name=_APPLICATION)) as connection:
            connection.autocommit = True
            yield connection
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(f"the database refused a step after a divergence ({str(error).strip()})") from error
