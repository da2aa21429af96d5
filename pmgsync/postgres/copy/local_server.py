"""The server that a database is to be restored on: what it is, and whether it fits. Looks, changes nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pmgsync.core.findings import Finding
from pmgsync.core.profile import Profile
from pmgsync.postgres.copy.database_restore import DatabaseRestore
from pmgsync.postgres.copy.databases import maintenance
from pmgsync.postgres.session import connect
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
    """

    version: int
    system_id: str
    database: str
    size: int | None
    was_member: bool
    data_directory: str


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
    was_member = False
    if size is not None:
        with contextlib.closing(connect(dsn, application_name="pmgcm join")) as connection:
            findings += check_server(connection, profile, tables=False)
            was_member = node_facts(connection) is not None
    directory = data.decode("utf-8", "surrogateescape")
    return LocalServer(version, system_id.decode(), name, size, was_member, directory), findings
