"""Provisioning: makes a database the home of a node's chain, all of it or nothing, and takes it all away again.

The order is forced by PostgreSQL. A published table without a usable key refuses UPDATE and DELETE, and a transaction
may have made one, or dropped a key, that nobody else sees yet. So the event triggers that give such tables an identity
come first, and what has begun without them must have ended before anything is published (sessions that have only read
are not waited for). The publication must be committed before the slot begins, because a transaction that wrote before
there was a publication jams pgoutput for good; creating the slot waits until every such transaction has ended, but
cannot be done in a transaction that has written. So: watch, objects, slot, and at last the row in pmgsync.node that
makes it count. Until that row is complete everything is a leftover, which the next attempt removes.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator

import psycopg2
import psycopg2.extensions

from pmgsync.core.positions import format_lsn
from pmgsync.core.profile import Profile
from pmgsync.errors import MembershipError, PmgsyncError, PreflightError, UnreachableError
from pmgsync.postgres import sql
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.names import ORIGIN_PREFIX, PUBLICATION, SET_UP_ORIGIN, SLOT
from pmgsync.postgres.session import connect, quote_ident
from pmgsync.postgres.setup import watch
from pmgsync.postgres.setup.node_row import NodeFacts, node_facts
from pmgsync.postgres.setup.standby_names import forget_names
from pmgsync.postgres.wal.slot import Progress, create_slot, wait_for_older

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 1
"""No longer than deadlock_timeout is for others, so that none of them ends because of a deadlock with this session."""
DEADLOCK_MS = 100
LOCK_TRIES = 60
DROP_PATIENCE_S = 20.0
POLL_S = 0.1

Connection = psycopg2.extensions.connection


def provision(
    dsn: str,
    profile: Profile,
    *,
    cid: int,
    cluster: bytes,
    needs_snapshot: bool,
    take_over_cid0: bool,
    progress: Progress | None = None,
) -> NodeFacts:
    """Make the database the home of a node's chain. Whatever ends it early, a signal too, leaves nothing behind.

    Args:
        cluster: the cluster's id, 16 bytes.
        needs_snapshot: True when the database has content that other members do not have; the positions it may hold of
            other chains are forgotten. False when it was just restored from a member's snapshot; they are kept.
        take_over_cid0: rows of CID 0 become this node's.
        progress: is told what is being waited for.

    Raises:
        MembershipError: when the database belongs to a cluster already.
        PreflightError: when the slot's name is taken.
        UnreachableError: when the server does not answer.
    """
    tell = progress or (lambda text: log.info("action=provision %s", text))
    with _session(dsn, "pmgsync provision") as connection:
        _execute(connection, "SELECT pg_catalog.pg_advisory_lock(hashtext('pmgsync.provision'))")
        if node_facts(connection) is not None:
            raise MembershipError("cluster already defined", hint="this database belongs to one")
        had_schema = bool(_value(connection, "SELECT pg_catalog.to_regnamespace('pmgsync')::oid::bigint"))
        _check_slot_name(connection)
        try:
            _remove(connection, drop_schema=False)
            incarnation = secrets.randbits(62) + 1
            _make_watch(connection, profile)
            wait_for_older(connection, tell)
            _make_objects(connection, profile, cid, cluster, incarnation, needs_snapshot, tell)
            with _session(dsn, "pmgsync provision") as creating:
                create_slot(creating, connection, SLOT, tell)
            _complete(connection, profile, cid, take_over_cid0=take_over_cid0)
        except BaseException as error:
            # Also for KeyboardInterrupt and SystemExit.
            tell("undoing what was done in the database")
            try:
                with _still_usable(connection, dsn) as undoing:
                    _remove(undoing, drop_schema=needs_snapshot or not had_schema)
            except PmgsyncError as second:
                error.add_note(f"it could not be undone now ({second}); the next attempt does it")
            raise
        facts = node_facts(connection)
    assert facts is not None
    log.info("action=provisioned cid=%d incarnation=%016x start=%s", cid, facts.incarnation, format_lsn(facts.start))
    return facts


def deprovision(dsn: str) -> None:
    """Remove everything that provisioning and applying made, finished or not; a database without it is no error.

    Raises:
        UnreachableError: when the server does not answer, or something is in use and stays so.
    """
    with _session(dsn, "pmgsync deprovision") as connection:
        _remove(connection, drop_schema=True)
    forget_names(dsn)


# -- the steps ---------------------------------------------------------------------------------------------------------


def _make_watch(connection: Connection, profile: Profile) -> None:
    """Make the schema and the event triggers: from now on no transaction makes a table without an identity."""
    with _transaction(connection):
        for name in ("schema.sql", "apply.sql"):
            _execute(connection, sql.script(name))
        watch.install(connection, profile, complete=False)
        watch.arm(connection)


def _make_objects(
    connection: Connection,
    profile: Profile,
    cid: int,
    cluster: bytes,
    incarnation: int,
    needs_snapshot: bool,
    tell: Progress,
) -> None:
    """Make publication and replica identities in one transaction, and the row, incomplete."""

    def make() -> None:
        if needs_snapshot:
            _execute(connection, "DELETE FROM pmgsync.position")
        # From 18 on a published key may hold generated columns only when these are published.
        stored = ", publish_generated_columns = stored" if connection.server_version >= 180000 else ""
        options = f"publish = 'insert, update, delete, truncate'{stored}"
        _execute(connection, f"CREATE PUBLICATION {PUBLICATION} WITH ({options})")
        _execute(connection, "SELECT pmgsync.maintain()")
        _execute(connection, "DELETE FROM pmgsync.node")
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO pmgsync.node (cid, cluster, incarnation, needs_snapshot, system_id, timeline, "
                "slot, publication, profile_digest) "
                "SELECT %s, %s, %s, %s, s.system_identifier::text, c.timeline_id, %s, %s, %s "
                "FROM pg_control_system() AS s, pg_control_checkpoint() AS c",
                (cid, cluster, incarnation, needs_snapshot, SLOT, PUBLICATION, profile.digest),
            )

    _patiently(connection, make, tell)


def _patiently(connection: Connection, act: Callable[[], None], tell: Progress) -> None:
    """Run something in a transaction, again and again while it does not get its locks at once: beside long transactions
    it could wait for hours, and everybody else would queue up behind it."""
    for attempt in range(LOCK_TRIES):
        try:
            with _transaction(connection):
                _execute(connection, f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
                _execute(connection, f"SET LOCAL deadlock_timeout = '{DEADLOCK_MS}ms'")
                act()
            return
        except (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected):
            if attempt == LOCK_TRIES - 1:
                raise
            if attempt == 0:
                tell("waiting for transactions that hold locks on tables without a key")
            time.sleep(POLL_S)


def _check_slot_name(connection: Connection) -> None:
    other = _value(
        connection,
        "SELECT database::text FROM pg_replication_slots WHERE slot_name = %s "
        "AND database IS DISTINCT FROM current_database()",
        SLOT,
    )
    if other is not None:
        raise PreflightError(
            f"the replication slot {SLOT} belongs to the database {other} of the same server",
            hint="use a server of its own for each node; if that node is gone, "
            f"drop the slot: SELECT pg_drop_replication_slot('{SLOT}')",
        )


def _complete(connection: Connection, profile: Profile, cid: int, *, take_over_cid0: bool) -> None:
    """Take over the rows of CID 0 and complete the node's row, in one transaction."""
    if take_over_cid0 and profile.cid0:
        # The slot exists: marked as another origin's, the updates are not in the chain. Every snapshot has them.
        _execute(connection, "SELECT pg_replication_origin_create(%s)", SET_UP_ORIGIN)
        _execute(connection, "SELECT pg_replication_origin_session_setup(%s)", SET_UP_ORIGIN)
    with _transaction(connection):
        if take_over_cid0:
            for table, column in profile.cid0:
                name = quote_ident(table.encode())
                quoted = quote_ident(column.encode())
                statement = b"UPDATE public.%s SET %s = %d WHERE %s = 0" % (name, quoted, cid, quoted)
                _execute(connection, statement)
        _execute(
            connection,
            "UPDATE pmgsync.node SET start_lsn = (SELECT confirmed_flush_lsn FROM pg_replication_slots "
            "WHERE slot_name = %s AND database = current_database())",
            SLOT,
        )
    if take_over_cid0 and profile.cid0:
        _execute(connection, "SELECT pg_replication_origin_session_reset()")
        _execute(connection, "SELECT pg_replication_origin_drop(%s)", SET_UP_ORIGIN)


def _remove(connection: Connection, *, drop_schema: bool) -> None:
    """Remove what provisioning made, and with the schema the origins of applying; what is in use is cut off first."""

    def quiet() -> None:
        # First: they would make the identities FULL again, and what nobody publishes needs none.
        watch.disarm(connection)
        _execute(connection, b"DROP PUBLICATION IF EXISTS " + quote_ident(PUBLICATION.encode()))
        if _value(connection, "SELECT pg_catalog.to_regclass('pmgsync.node')::oid::bigint") is not None:
            _execute(connection, "DELETE FROM pmgsync.node")

    def remove() -> None:
        if _value(connection, "SELECT pg_catalog.to_regclass('pmgsync.replica_identity')::oid::bigint") is not None:
            _restore_identities(connection)
        if drop_schema:
            _execute(connection, "SET LOCAL client_min_messages = warning")
            _execute(connection, "DROP SCHEMA IF EXISTS pmgsync CASCADE")

    _patiently(connection, quiet, lambda text: log.info("action=remove %s", text))
    _patiently(connection, remove, lambda text: log.info("action=remove %s", text))
    _drop_in_use(
        connection,
        "SELECT active_pid, NULL FROM pg_replication_slots WHERE slot_name = %s AND database = current_database()",
        "SELECT pg_drop_replication_slot(%s)",
        SLOT,
    )
    origins = [SET_UP_ORIGIN]
    if drop_schema:
        with connection.cursor() as cursor:
            cursor.execute("SELECT roname FROM pg_replication_origin WHERE starts_with(roname, %s)", (ORIGIN_PREFIX,))
            origins = [as_text(name) for (name,) in cursor.fetchall()]
    for origin in origins:
        _drop_in_use(
            connection,
            "SELECT NULL, roident FROM pg_replication_origin WHERE roname = %s",
            "SELECT pg_replication_origin_drop(%s)",
            origin,
        )


def _restore_identities(connection: Connection) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT DISTINCT ON (c.oid) n.nspname, c.relname, i.identity::text, "
            "CASE WHEN EXISTS (SELECT FROM pg_class AS x JOIN pg_index AS k ON k.indexrelid = x.oid "
            "WHERE k.indrelid = c.oid AND x.relname = i.index) THEN i.index ELSE '' END "
            "FROM pmgsync.replica_identity AS i JOIN pg_class AS c ON c.relkind = 'r' AND c.relreplident = 'f' "
            "JOIN pg_namespace AS n ON n.oid = c.relnamespace "
            "WHERE CASE WHEN i.relation IS NULL THEN n.nspname = i.schema AND c.relname = i.name "
            "ELSE c.oid = i.relation END ORDER BY c.oid, i.noticed"
        )
        for schema, name, identity, index in cursor.fetchall():
            clause = {b"d": b"DEFAULT", b"i": b"USING INDEX " + quote_ident(index)}.get(identity, b"NOTHING")
            if identity == b"i" and not index:
                clause = b"NOTHING"  # as it was: the index had been dropped
            table = quote_ident(schema) + b"." + quote_ident(name)
            _execute(connection, b"ALTER TABLE ONLY %s REPLICA IDENTITY %s" % (table, clause))
    _execute(connection, "DELETE FROM pmgsync.replica_identity")


def _drop_in_use(connection: Connection, find: str, drop: str, name: str) -> None:
    """Drop something that a session may hold, after ending that session; PostgreSQL needs an instant to notice."""
    deadline = time.monotonic() + DROP_PATIENCE_S
    while True:
        with connection.cursor() as cursor:
            cursor.execute(find, (name,))
            found = cursor.fetchone()
            if found is None:
                return
            if found[0] is not None:
                cursor.execute("SELECT pg_terminate_backend(%s)", (found[0],))
            try:
                cursor.execute(drop, (name,))
                return
            except psycopg2.errors.UndefinedObject:
                return
            except psycopg2.errors.ObjectInUse as error:
                if time.monotonic() > deadline:
                    raise UnreachableError(
                        f"{name} is in use and cannot be removed ({_first_line(error)})",
                        hint="stop pmgsync-agent on this node, and try again",
                    ) from error
        time.sleep(POLL_S)


# -- small things ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _session(dsn: str, name: str) -> Iterator[Connection]:
    """Yield a session in autocommit mode; errors of the server become this project's."""
    connection = connect(dsn, application_name=name)
    try:
        connection.autocommit = True
        yield connection
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise UnreachableError(f"the database could not be set up ({str(error).strip()})") from error
    except psycopg2.Error as error:
        raise PmgsyncError(f"the database could not be set up ({str(error).strip()})") from error
    finally:
        with contextlib.suppress(psycopg2.Error):
            connection.close()


@contextlib.contextmanager
def _still_usable(connection: Connection, dsn: str) -> Iterator[Connection]:
    """Yield the session that holds the lock when it survived what happened, otherwise a new one."""
    if not connection.closed and connection.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE:
        if _value(connection, "SELECT pg_replication_origin_session_is_setup()"):
            _execute(connection, "SELECT pg_replication_origin_session_reset()")
        yield connection
        return
    with contextlib.suppress(psycopg2.Error):
        connection.close()
    with _session(dsn, "pmgsync provision") as other:
        yield other


@contextlib.contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    _execute(connection, "BEGIN")
    try:
        yield
    except BaseException:
        with contextlib.suppress(psycopg2.Error):
            _execute(connection, "ROLLBACK")
        raise
    _execute(connection, "COMMIT")


def _execute(connection: Connection, statement: str | bytes, *parameters: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters or None)


def _value(connection: Connection, query: str, *parameters: object) -> object:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters or None)
        row = cursor.fetchone()
    value = None if row is None else row[0]
    return as_text(value) if isinstance(value, bytes) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
