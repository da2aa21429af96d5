"""The watch: event triggers that keep publication and replica identities right while tables come, change and go.

sql/watch.sql has the rules. Made by provisioning, maintained by the agent, gone with the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg2.extensions

from pmgsync.core.profile import Profile
from pmgsync.postgres import sql
from pmgsync.postgres.catalog import as_bytes, as_text
from pmgsync.postgres.session import quote_literal

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection  # noqa: N812

MAINTAIN_LOCK_MS = 50
"""Milliseconds that maintenance waits for a lock: everybody else queues up behind it meanwhile."""

_TAGS = (
    "CREATE TABLE", "CREATE TABLE AS", "SELECT INTO", "ALTER TABLE",
    "CREATE SCHEMA", "ALTER SCHEMA", "CREATE EXTENSION", "ALTER EXTENSION",
)  # fmt: skip
_EVENT_TRIGGERS = {
    # ALWAYS: schema changes that come through the stream are made under session_replication_role = replica.
    "pmgsync_watch": f"ON ddl_command_end WHEN TAG IN ({', '.join(map(repr, _TAGS))}) EXECUTE FUNCTION pmgsync.watch()",
    "pmgsync_watch_drop": "ON sql_drop EXECUTE FUNCTION pmgsync.watch()",
    "pmgsync_watch_rewrite": "ON table_rewrite EXECUTE FUNCTION pmgsync.watch_rewrite()",
}
# They fire in the order of their names: first the caller, then what was changed, then the watch. Not ALWAYS, for what
# came through the stream does not go on.
_DDL_TRIGGERS = {
    "pmgsync_ddl_caller": "ON ddl_command_end EXECUTE FUNCTION pmgsync.ddl_caller()",
    "pmgsync_ddl_dropped": "ON sql_drop EXECUTE FUNCTION pmgsync.ddl_dropped()",
    "pmgsync_ddl_publish": "ON ddl_command_end EXECUTE FUNCTION pmgsync.ddl_publish()",
    "pmgsync_ddl_rewrite": "ON table_rewrite EXECUTE FUNCTION pmgsync.ddl_rewrite()",
}
GUARD_TRIGGER = "pmgsync_guard"
EVENT_TRIGGERS = (*_DDL_TRIGGERS, *_EVENT_TRIGGERS, GUARD_TRIGGER)
"""Event triggers that pmgsync may have made in a database."""


def install(connection: Connection, profile: Profile, *, complete: bool = True) -> None:
    """Make the functions, note the profile, and complete identities and publication, in the caller's transaction.

    The event triggers follow with `arm`; until then nothing happens by itself.

    Args:
        complete: False leaves identities and publication as they are.

    Raises:
        psycopg2.Error: LockNotAvailable among others, when a table without a key is in use and lock_timeout is set.
    """
    named = b", ".join(
        b"(%s)" % b", ".join(quote_literal(as_bytes(part)) for part in (rule.schema, rule.name, rule.policy.value))
        for rule in profile.tables
    )
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL client_min_messages = warning")
        for name in ("emit.sql", "watch.sql", "ddl.sql", "guard.sql"):
            cursor.execute(sql.script(name))
        cursor.execute("DELETE FROM pmgsync.profile; DELETE FROM pmgsync.profile_table")
        cursor.execute(
            "INSERT INTO pmgsync.profile (all_tables, ddl) VALUES (%s, %s)", (profile.all_tables, profile.ddl)
        )
        if named:
            cursor.execute(b"INSERT INTO pmgsync.profile_table (schema, name, policy) VALUES " + named)
        if complete:
            cursor.execute("SELECT pmgsync.maintain()")


def arm(connection: Connection) -> None:
    """Make the event triggers, in the caller's transaction."""
    with connection.cursor() as cursor:
        disarm(connection, *_DDL_TRIGGERS, *_EVENT_TRIGGERS)
        for name, definition in _EVENT_TRIGGERS.items():
            cursor.execute(f"CREATE EVENT TRIGGER {name} {definition}")
            cursor.execute(f"ALTER EVENT TRIGGER {name} ENABLE ALWAYS")
        cursor.execute("SELECT ddl FROM pmgsync.profile")
        if cursor.fetchone() == (True,):
            for name, definition in _DDL_TRIGGERS.items():
                cursor.execute(f"CREATE EVENT TRIGGER {name} {definition}")


def disarm(connection: Connection, *names: str) -> None:
    """Remove event triggers, all of pmgsync's unless some are named."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT evtname FROM pg_catalog.pg_event_trigger")
        here = {as_text(name) for (name,) in cursor.fetchall()}
        for name in names or EVENT_TRIGGERS:
            if name in here:
                cursor.execute(f"DROP EVENT TRIGGER {name}")


def armed(connection: Connection) -> bool:
    """Return True when the event triggers are there and fire."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT e.evtname, e.evtenabled::text, p.ddl FROM pmgsync.profile AS p "
            "LEFT JOIN pg_catalog.pg_event_trigger AS e ON e.evtname = ANY (%s)",
            (list(EVENT_TRIGGERS),),
        )
        found = [(as_text(name), as_text(enabled), ddl) for name, enabled, ddl in cursor.fetchall() if name]
    enabled = {name: state for name, state, _ in found}
    carries = any(ddl for _, _, ddl in found)
    return all(enabled.get(name) == "A" for name in _EVENT_TRIGGERS) and all(
        (enabled.get(name) in {"O", "A"}) == carries for name in _DDL_TRIGGERS
    )


def maintain(connection: Connection) -> None:
    """Make good what the event triggers could not do; the session is in autocommit mode.

    Raises:
        psycopg2.errors.LockNotAvailable: when a table or the publication is in use; it is to be tried again.
    """
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        try:
            cursor.execute(f"SET LOCAL lock_timeout = {MAINTAIN_LOCK_MS}")
            cursor.execute("SELECT pmgsync.maintain()")
            cursor.execute("COMMIT")
        except psycopg2.Error:
            if not connection.closed:
                cursor.execute("ROLLBACK")
            raise


_LEFT_OUT = """
SELECT t.schema, t.name FROM pmgsync.tables AS t
WHERE t.policy <> 'local' AND NOT t.extension AND t.persistence = 'p' AND NOT t.wanted ORDER BY 1, 2
"""


def left_out(connection: Connection) -> list[str]:
    """Return the tables that PostgreSQL cannot publish: without a usable key, and with a virtual generated column."""
    with connection.cursor() as cursor:
        cursor.execute(_LEFT_OUT)
        return [f"{as_text(schema)}.{as_text(name)}" for schema, name in cursor.fetchall()]
