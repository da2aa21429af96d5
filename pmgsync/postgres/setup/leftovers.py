"""What a cluster has made in a database, finished or not, in words, for the person who agrees to its removal."""

from __future__ import annotations

import contextlib

import psycopg2

from pmgsync.errors import UnreachableError
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.names import PUBLICATION, SLOT
from pmgsync.postgres.session import connect

_LEFTOVERS = """
SELECT 'the schema pmgsync' FROM pg_namespace WHERE nspname = 'pmgsync'
UNION ALL
SELECT format('the publication %%s', pubname) FROM pg_publication WHERE pubname = %(publication)s
UNION ALL
SELECT format('the replication slot %%s, which keeps %%s of WAL', slot_name,
              pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)))
FROM pg_replication_slots WHERE slot_name = %(slot)s AND database = current_database()
UNION ALL
SELECT format('%%s triggers on tables and %%s event triggers', tables, events)
FROM (SELECT count(*) AS tables FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
      JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = 'pmgsync' AND NOT t.tgisinternal) AS t,
     (SELECT count(*) AS events FROM pg_event_trigger AS e JOIN pg_proc AS p ON p.oid = e.evtfoid
      JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = 'pmgsync') AS e
WHERE tables + events > 0
"""


def find_leftovers(dsn: str) -> list[str]:
    """Return what there is, a phrase each; nothing when the database knows no cluster.

    Raises:
        UnreachableError: when the server does not answer.
    """
    try:
        with contextlib.closing(connect(dsn, application_name="pmgcm leave")) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(_LEFTOVERS, {"publication": PUBLICATION, "slot": SLOT})
                return [as_text(text) for (text,) in cursor.fetchall()]
    except psycopg2.Error as error:
        raise UnreachableError(f"the database could not be looked at ({str(error).strip()})") from error
