"""What a database knows of its node: the row in pmgsync.node and the slot behind it, read together, and begun anew."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions

from pmgsync import __version__
from pmgsync.core.profile import Profile
from pmgsync.errors import ChainBrokenError, ConfigError, MembershipError, UnreachableError
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.pg_dump import find_pg_dump
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.inventory import schema_digest
from pmgsync.postgres.setup.node_row import NodeFacts, node_facts
from pmgsync.postgres.wal.slot import create_slot
from pmgsync.postgres.wal.slot_reader import SlotState, read_slot_state

log = logging.getLogger(__name__)


def read_node(dsn: str) -> tuple[NodeFacts, SlotState]:
    """Return what the database says of its node and of the slot.

    Raises:
        UnreachableError: when the server does not answer.
        MembershipError: when the database was not set up by `create` or `join`.
    """
    connection = connect(dsn, application_name="pmgsync node")
    try:
        connection.autocommit = True
        facts = node_facts(connection)
        if facts is None:
            raise MembershipError(
                "the database is not set up for a cluster",
                hint="it was replaced or restored after this node joined: run `pmgcm join` again",
            )
        return facts, read_slot_state(connection, facts.slot)
    except psycopg2.Error as error:
        raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
    finally:
        connection.close()


def read_facts(dsn: str, profile: Profile) -> dict[str, Any]:
    """Return what a newcomer must know of this database before it joins.

    Raises:
        UnreachableError: when the server does not answer.
    """
    connection = connect(dsn, application_name="pmgsync facts")
    try:
        connection.autocommit = True
        facts = {
            **database_facts(connection),
            "profile_digest": profile.digest,
            "schema_digest": schema_digest(connection, profile),
        }
    except psycopg2.Error as error:
        raise UnreachableError(f"the database did not answer ({str(error).strip()})") from error
    finally:
        connection.close()
    problem, hint = _snapshot_problem(facts["server_version"] // 10000)
    return {
        **facts,
        "snapshot_problem": problem,
        "snapshot_hint": hint,
        "product": __version__,
        "time": time.time_ns() // 1000,
    }


def _snapshot_problem(server_major: int) -> tuple[str, str]:
    """Return why this node cannot give a snapshot, and what helps; "" twice when it can."""
    try:
        find_pg_dump(server_major)
    except ConfigError as error:
        return error.message, error.hint
    return "", ""


_FACTS = """
SELECT current_setting('server_version_num')::int, pg_encoding_to_char(d.encoding)::text, d.datcollate::text,
       d.datctype::text, d.datlocprovider::text, to_jsonb(d) ->> 'daticulocale', to_jsonb(d) ->> 'datlocale',
       to_jsonb(d) ->> 'daticurules', pg_database_size(d.oid),
       (SELECT system_identifier FROM pg_control_system())::text
FROM pg_database AS d WHERE d.datname = current_database()
"""
PROTOCOL_VERSION = 1


def database_facts(connection: psycopg2.extensions.connection) -> dict[str, Any]:
    """Return what a newcomer must know of this database before it joins; text is `str`, sizes are in bytes.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute(_FACTS)
        row = cursor.fetchone()
    assert row is not None
    values = [as_text(value) if isinstance(value, bytes) else value for value in row]
    version, encoding, collate, ctype, provider, icu, locale, rules, size, system_id = values
    return {
        "server_version": version, "encoding": encoding, "collate": collate, "ctype": ctype,
        "provider": provider, "locale": icu or locale or "", "icu_rules": rules or "", "bytes": size,
        "system_id": system_id, "protocol": PROTOCOL_VERSION,
    }  # fmt: skip


def renew_chain(dsn: str, facts: NodeFacts) -> None:
    """Begin a new incarnation of this node's chain: a slot made anew, which the others join with a snapshot.

    Interrupted at any instant it is done again: a slot that does not fit the row in pmgsync.node is a broken chain.

    Raises:
        UnreachableError: when the server does not answer, or the old slot is in use.
        ChainBrokenError: when the database has no node any more.
    """
    incarnation = secrets.randbits(62) + 1
    try:
        with _session(dsn) as watching, _session(dsn) as creating:
            with watching.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots "
                    "WHERE slot_name = %s",
                    (facts.slot,),
                )
            # In a session of its own: one that has made a logical slot does not find every table afterwards.
            create_slot(creating, watching, facts.slot, lambda text: log.warning("action=new-chain %s", text))
            with watching.cursor() as cursor:
                cursor.execute(
                    "UPDATE pmgsync.node SET incarnation = %s, needs_snapshot = true, "
                    "start_lsn = (SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots "
                    "WHERE slot_name = %s), "
                    "system_id = (SELECT system_identifier FROM pg_catalog.pg_control_system())::text, "
                    "timeline = (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint())",
                    (incarnation, facts.slot),
                )
                if cursor.rowcount != 1:
                    raise ChainBrokenError("the database has no row in pmgsync.node any more")
    except psycopg2.Error as error:
        raise UnreachableError(f"a new chain could not be begun ({str(error).strip()})") from error
    log.error("action=new-chain incarnation=%016x", incarnation)


@contextlib.contextmanager
def _session(dsn: str) -> Iterator[psycopg2.extensions.connection]:
    connection = connect(dsn, application_name="pmgsync new chain")
    try:
        connection.autocommit = True
        yield connection
    finally:
        with contextlib.suppress(psycopg2.Error):
            connection.close()
