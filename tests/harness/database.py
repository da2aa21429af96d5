"""One database of a real server, and what provisioning has left in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2.extensions

import cli.demo
from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.profile import Profile
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.node_row import NodeFacts, node_facts
from pmgsync.postgres.setup.provision import provision

CLUSTER = b"0123456789abcdef"
GATEWAY = Path(cli.demo.__file__).with_name("pmg_schema.sql")

_LEFT = """
SELECT (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_publication),
       (SELECT count(*) FROM pg_namespace WHERE nspname = 'pmgsync'), (SELECT count(*) FROM pg_replication_origin),
       (SELECT count(*) FROM pg_class WHERE relreplident = 'f')
"""


class Database:
    """One database of a running server."""

    def __init__(self, server: EmbeddedPostgres, name: str = "app", encoding: str = "UTF8") -> None:
        with self.connection(server.dsn("postgres")) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        self.dsn = server.dsn(name)

    @contextlib.contextmanager
    def connection(self, dsn: str = "") -> Iterator[psycopg2.extensions.connection]:
        connection = connect(dsn or self.dsn, application_name="test")
        connection.autocommit = True
        try:
            yield connection
        finally:
            connection.close()

    def sql(self, statement: str | bytes) -> list[tuple[Any, ...]]:
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def provision(self, profile: Profile, **options: Any) -> NodeFacts:
        given: dict[str, Any] = {"cid": 1, "cluster": CLUSTER, "needs_snapshot": True, "take_over_cid0": True} | options
        return provision(self.dsn, profile, **given)

    def facts(self) -> NodeFacts | None:
        with self.connection() as connection:
            return node_facts(connection)

    def left(self) -> tuple[int, ...]:
        """Slots, publications, schemas, origins, and tables with REPLICA IDENTITY FULL."""
        return self.sql(_LEFT)[0]
