"""Preflight: what must hold on a server before a node is created on it or joins with it. Looks, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg2
import psycopg2.extensions

from pmgsync.core.findings import Finding, judged
from pmgsync.core.profile import DEFAULT_SCHEMA, Policy, Profile, TableRule
from pmgsync.errors import UnreachableError
from pmgsync.postgres.catalog import Table, as_bytes, as_text, list_tables, synchronised
from pmgsync.postgres.names import SLOT

OLDEST, NEWEST = 15, 18
"""Major versions of PostgreSQL that are tested."""
FREE_SLOTS = 2
"""One for the chain, one for a snapshot; as many walsenders."""


def check_server(connection: psycopg2.extensions.connection, profile: Profile, *, tables: bool = True) -> list[Finding]:
    """Check a server and, with `tables`, that the database has what the profile speaks of.

    Args:
        connection: a session on the node's database; for a node that joins any database of the server will do.
        tables: False for a node that joins: its database is replaced.

    Raises:
        UnreachableError: when a check could not run.
    """
    try:
        findings = [*_check_settings(connection), *_check_database(connection)]
        if tables:
            findings += check_tables(list_tables(connection), profile, _partitioned(connection))
    except psycopg2.Error as error:
        raise UnreachableError(f"the server could not be checked ({str(error).strip()})") from error
    return findings


_SETTINGS = """
SELECT current_setting('server_version_num')::int / 10000, current_setting('server_version'),
       current_setting('wal_level'), current_setting('max_replication_slots')::int,
       (SELECT count(*) FROM pg_replication_slots)::int,
       current_setting('max_wal_senders')::int,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender')::int,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), current_user::text, pg_is_in_recovery()
"""


def _check_settings(connection: psycopg2.extensions.connection) -> Iterable[Finding]:
    with connection.cursor() as cursor:
        cursor.execute(_SETTINGS)
        row = cursor.fetchone()
    assert row is not None
    values: list[Any] = [as_text(value) if isinstance(value, bytes) else value for value in row]
    major, version, wal_level, slots, used_slots, senders, used_senders, superuser, user, standby = values
    restart = "and restart PostgreSQL"
    yield judged(
        "server version", OLDEST <= major <= NEWEST,
        f"the server is PostgreSQL {version}, pmgsync works with {OLDEST} to {NEWEST}",
        f"upgrade it to PostgreSQL {OLDEST} or later" if major < OLDEST else "use an earlier PostgreSQL",
    )  # fmt: skip
    yield judged(
        "not a standby", not standby,
        "the server is a standby and cannot be written to", "use its primary, or promote it",
    )  # fmt: skip
    yield judged(
        "wal_level", wal_level == "logical",
        f"wal_level is {wal_level}", f"set wal_level = logical {restart}",
    )  # fmt: skip
    free = slots - used_slots
    yield judged(
        "replication slots", free >= FREE_SLOTS,
        f"{max(0, free)} of {slots} replication slots are free, {FREE_SLOTS} are needed",
        f"set max_replication_slots = {used_slots + FREE_SLOTS} or more {restart}, or drop slots that nobody uses",
    )  # fmt: skip
    free = senders - used_senders
    yield judged(
        "walsenders", free >= FREE_SLOTS,
        f"{max(0, free)} of {senders} walsenders are free, {FREE_SLOTS} are needed",
        f"set max_wal_senders = {used_senders + FREE_SLOTS} or more {restart}",
    )  # fmt: skip
    yield judged(
        "superuser", bool(superuser),
        f"the database user {user} is not a superuser, which session_replication_role and replication origins need",
        f"ALTER ROLE {user} SUPERUSER, or name another user in the dsn of node.toml",
    )  # fmt: skip


_DATABASE = """
SELECT current_database()::text, pg_encoding_to_char(d.encoding)::text,
       (SELECT s.database::text FROM pg_replication_slots AS s
        WHERE s.slot_name = %s AND s.database IS DISTINCT FROM d.datname)
FROM pg_database AS d WHERE d.datname = current_database()
"""


def _check_database(connection: psycopg2.extensions.connection) -> Iterable[Finding]:
    with connection.cursor() as cursor:
        cursor.execute(_DATABASE, (SLOT,))
        row = cursor.fetchone()
    assert row is not None
    name, encoding, foreign = (None if value is None else as_text(value) for value in row)
    yield judged(
        "encoding", bool(encoding), f"the encoding of the database {name} is not known", "make the database anew"
    )
    yield judged(
        "slot name", foreign is None,
        f"the replication slot {SLOT} belongs to the database {foreign} of the same server",
        f"use a server of its own for each node; if that node is gone: SELECT pg_drop_replication_slot('{SLOT}')",
    )  # fmt: skip


def _partitioned(connection: psycopg2.extensions.connection) -> set[tuple[str, str]]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
            "WHERE c.relkind = 'p'"
        )
        return {(as_text(schema), as_text(name)) for schema, name in cursor.fetchall()}


def check_tables(
    tables: Iterable[Table], profile: Profile, partitioned: Iterable[tuple[str, str]] = ()
) -> list[Finding]:
    """Check that the tables fit the profile. Pure.

    Args:
        partitioned: (schema, name) of partitioned tables, which hold no rows themselves.
    """
    found = {(as_text(table.schema), as_text(table.name)): table for table in tables}
    roots = set(partitioned)
    findings: list[Finding] = []
    missing: list[str] = []
    for rule in profile.tables:
        if rule.policy is Policy.LOCAL:
            continue
        table = found.get((rule.schema, rule.name))
        if table is not None:
            named_in = [each for tree in profile.files for each in tree.named_in]
            naming = {column for name, column in named_in if (DEFAULT_SCHEMA, name) == (rule.schema, rule.name)}
            findings += _check_table(table, rule, naming)
        elif (rule.schema, rule.name) in roots:
            findings.append(
                Finding("partitions", False, f"the table {_label(rule)} is partitioned", "name its partitions instead")
            )
        else:
            missing.append(_label(rule))
    findings.append(
        judged(
            "tables", not missing,
            f"tables of the profile {profile.name} are not in the database: {', '.join(missing)}",
            "see whether the dsn in node.toml names the right database, and the profile the right tables",
        )
    )  # fmt: skip
    keyless = [table.label for table, _ in synchronised(list(found.values()), profile) if not table.usable]
    if keyless:
        text = f"tables without a usable key are given REPLICA IDENTITY FULL: {', '.join(keyless)}"
        findings.append(Finding("keys", True, text, "a primary key makes their updates and deletes faster"))
    return findings


def _label(rule: TableRule) -> str:
    return rule.name if rule.schema == DEFAULT_SCHEMA else f"{rule.schema}.{rule.name}"


def _check_table(table: Table, rule: TableRule, naming: set[str]) -> Iterable[Finding]:
    columns = {as_text(column.name) for column in table.columns}
    missing = sorted((rule.columns | naming) - columns)
    yield judged(
        "columns", not missing,
        f"the table {_label(rule)} lacks columns that the profile refers to: {', '.join(missing)}",
        "upgrade the database's schema, or correct the profile",
    )  # fmt: skip
    yield judged(
        "logged", table.persistence == b"p",
        f"the table {_label(rule)} is unlogged, its changes are not in the WAL",
        f"ALTER TABLE {_label(rule)} SET LOGGED, or make it local in the profile",
    )  # fmt: skip
    if rule.policy is Policy.MERGE:
        yield judged(
            "merge key", bool(rule.key or table.primary_key),
            f"the table {_label(rule)} has no primary key, and the profile names no key to merge its rows by",
            "give it a primary key, or a key in the profile",
        )  # fmt: skip
        key = {as_bytes(name) for name in rule.key} or set(table.primary_key)
        generated = sorted(as_text(column.name) for column in table.columns if column.generated and column.name in key)
        yield judged(
            "generated key", not generated,
            f"the table {_label(rule)} would be merged by generated columns: {', '.join(generated)}",
            "name a key of other columns in the profile",
        )  # fmt: skip
