"""The server that a database is to be restored on: what it is, and whether it fits. Looks, changes nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg2

from pmgsync.core.findings import Finding
from pmgsync.core.profile import Profile
from pmgsync.errors import UnreachableError
from pmgsync.postgres.copy.database_restore import DatabaseRestore
from pmgsync.postgres.copy.databases import maintenance
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.inventory import OwnRows, count_own_rows, list_users, schema_digest
from pmgsync.postgres.setup.node_row import node_facts
from pmgsync.postgres.setup.preflight import check_server


@dataclass(frozen=True, slots=True)
class LocalServer:
    """What is known of a node's server.

    Attributes:
        version: major version of PostgreSQL.
        database: name of the database that is to be replaced.
        size: its bytes, None when there is none yet.
        was_member: True when it was set up for a cluster before.
        data_directory: where the server keeps its data, on its machine.
        own_rows: what the node has of its own in that database.
        users: who has sessions on it, and how many.
        schema: digest of its synchronised tables, "" when there are none.
    """

    version: int
    system_id: str
    database: str
    size: int | None
    was_member: bool
    data_directory: str
    own_rows: tuple[OwnRows, ...]
    users: tuple[tuple[str, int], ...]
    schema: str


def examine_server(dsn: str, profile: Profile) -> tuple[LocalServer, list[Finding]]:
    """Return what the server is, and what is found about it; the tables of the database are not looked at.

    Raises:
        UnreachableError: when the server does not answer.
        PmgsyncError: when the database cannot be replaced at all.
    """
    name = DatabaseRestore(dsn, {}).name
    findings: list[Finding] = []
    with maintenance(dsn, name) as cursor:
        cursor.execute(
            "SELECT current_setting('server_version_num')::int / 10000, current_setting('data_directory'), "
            "(SELECT system_identifier FROM pg_control_system())::text, "
            "(SELECT pg_database_size(oid) FROM pg_database WHERE datname = %s)",
            (name,),
        )
        row = cursor.fetchone()
        assert row is not None
        version, data, system_id, size = row
        if size is None:
            findings += check_server(cursor.connection, profile, tables=False)
        users = list_users(cursor, name)
    was_member, own_rows, schema = False, list[OwnRows](), ""
    if size is not None:
        try:
            with contextlib.closing(connect(dsn, application_name="pmgcm join")) as connection:
                findings += check_server(connection, profile, tables=False)
                was_member = node_facts(connection) is not None
                own_rows = count_own_rows(connection, profile)
                schema = schema_digest(connection, profile)
        except psycopg2.Error as error:
            raise UnreachableError(f"the database {name} could not be looked at ({str(error).strip()})") from error
    server = LocalServer(
        version=version,
        system_id=system_id.decode(),
        database=name,
        size=size,
        was_member=was_member,
        data_directory=data.decode("utf-8", "surrogateescape"),
        own_rows=tuple(own_rows),
        users=tuple(users),
        schema=schema,
    )
    return server, findings
