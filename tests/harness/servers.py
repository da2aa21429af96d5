"""Servers that tests share: one for each PostgreSQL and test process, with databases that come and go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import quote_ident

from cli.demo.embedded import EmbeddedPostgres
from pmgsync.postgres.programs import BINDIR_VARIABLE

SETTINGS = {"max_prepared_transactions": "2"}

_LEFT = """
SELECT 2, 'database', datname::text FROM pg_database WHERE datname NOT IN ('postgres', 'template0', 'template1')
UNION ALL SELECT 1, 'slot', slot_name::text FROM pg_replication_slots
UNION ALL SELECT 3, 'origin', roname FROM pg_replication_origin
UNION ALL SELECT 4, 'role', rolname::text FROM pg_roles WHERE rolname NOT LIKE 'pg\\_%' AND rolname <> 'postgres'
"""
_SESSIONS = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND backend_type IN ('client backend', 'walsender')
"""
_KEPT = """
SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace)
     + (SELECT count(*) FROM pg_publication)
     + (SELECT count(*) FROM pg_file_settings WHERE sourcefile LIKE '%auto.conf')
"""


class SharedServer:
    """A running server with nothing in it. A test makes databases, slots and roles; `clean` removes them.

    What changes the server itself (its settings, its database `postgres`, a stop or a kill) needs a server of its own.
    """

    def __init__(self) -> None:
        self.bindir = os.environ[BINDIR_VARIABLE]
        self.server = EmbeddedPostgres(settings=SETTINGS)
        self.server.start()

    def clean(self) -> None:
        """Remove what a test has left.

        Raises:
            AssertionError: when it has changed what others share.
        """
        assert self.server.running, "a test that ends the server needs one of its own"
        with self._session() as cursor:
            cursor.execute(_LEFT)
            left = sorted(cursor.fetchall())
            if left:
                cursor.execute(_SESSIONS)
                cursor.execute("SELECT gid, database FROM pg_prepared_xacts")
                for gid, database in cursor.fetchall():
                    with self._session(database) as there:
                        there.execute("ROLLBACK PREPARED %s", (gid,))
            for _, kind, name in left:
                match kind:
                    case "slot":
                        cursor.execute("SELECT pg_drop_replication_slot(%s)", (name,))
                    case "database":
                        cursor.execute(f"DROP DATABASE {quote_ident(name, cursor)} WITH (FORCE)")
                    case "origin":
                        cursor.execute("SELECT pg_replication_origin_drop(%s)", (name,))
                    case "role":
                        cursor.execute(f"DROP ROLE {quote_ident(name, cursor)}")
            cursor.execute(_KEPT)
            assert cursor.fetchall() == [(0,)], "a test that changes the server itself needs one of its own"

    @contextlib.contextmanager
    def _session(self, dbname: str = "postgres") -> Iterator[psycopg2.extensions.cursor]:
        with contextlib.closing(psycopg2.connect(self.server.dsn(dbname))) as connection:
            connection.autocommit = True
            yield connection.cursor()


class SharedServers:
    """The shared servers of a test process."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, str], SharedServer] = {}

    def get(self, name: str = "") -> SharedServer:
        """Return a server of the PostgreSQL that is chosen now; another name is another server."""
        key = os.environ[BINDIR_VARIABLE], name
        found = self._servers.get(key)
        if found is None or not found.server.running:
            if found is not None:
                found.server.close()
            found = self._servers[key] = SharedServer()
        return found

    def close(self) -> None:
        """End all of them."""
        for shared in self._servers.values():
            shared.server.close()
