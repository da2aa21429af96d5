"""Having tables fetched anew by hand: which ones an origin answers for, and which of them have not come yet."""

from __future__ import annotations

from pmgsync.core.owners import Writers
from pmgsync.core.profile import Policy, Profile
from pmgsync.postgres.catalog import list_tables, synchronised
from pmgsync.postgres.copy.checksums import checking
from pmgsync.postgres.copy.take import chain_condition

TableName = tuple[bytes, bytes]
ASKED_FOR = "an administrator has asked for it"


def answered_tables(dsn: str, profile: Profile, writers: Writers) -> dict[TableName, Policy]:
    """Return the tables of which an origin answers for rows, by schema and name.

    Raises:
        PmgsyncError: when the database cannot be read.
    """
    with checking(dsn) as connection:
        return {
            (table.schema, table.name): rule.policy
            for table, rule in synchronised(list_tables(connection), profile)
            if chain_condition(rule, writers) is not None
        }


def waiting_tables(dsn: str, origin: int) -> dict[TableName, str]:
    """Return the tables of an origin that are still to be fetched, with the reason.

    Raises:
        PmgsyncError: when the database cannot be read.
    """
    with checking(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT schema, name, reason FROM pmgsync.stale_table WHERE origin = %s AND kind <> 'none'", (origin,)
        )
        found = {}
        for schema, name, reason in cursor.fetchall():
            found[bytes(schema), bytes(name)] = bytes(reason).decode(errors="backslashreplace")
        return found
