"""Checks of a node's database for `pmgcm doctor`: slot, publication, guard, schema and sequences, as findings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812

from pmgsync.core.findings import Finding
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.profile import Profile
from pmgsync.errors import UnreachableError
from pmgsync.postgres.catalog import as_text
from pmgsync.postgres.names import PUBLICATION, SLOT
from pmgsync.postgres.session import connect
from pmgsync.postgres.setup.guard import guarded_by, unguarded
from pmgsync.postgres.setup.node_row import NodeFacts, node_facts
from pmgsync.postgres.setup.preflight import check_server
from pmgsync.postgres.setup.sequence_values import covered
from pmgsync.postgres.setup.standby_names import Names, read_names
from pmgsync.postgres.setup.watch import armed
from pmgsync.postgres.wal.slot_reader import SlotState, read_slot_state

RETAINED_BYTES = 1 << 30
SHOWN = 8
"""Names that one finding lists."""
RESTART_AGENT = "start it, or look at it: systemctl status pmgsync-agent; it puts this right within seconds"


def check_database(dsn: str, profile: Profile, document: ClusterDocument | None, cid: int) -> Iterator[Finding]:
    """Yield what is found in this node's database.

    Args:
        document: the cluster's, None when no cluster is defined here.
        cid: this node's, 0 when it is in no cluster.

    Raises:
        UnreachableError: when the database does not answer.
    """
    try:
        with contextlib.closing(connect(dsn, application_name="pmgcm doctor")) as connection:
            connection.autocommit = True
            facts = node_facts(connection)
            slot = read_slot_state(connection, SLOT)
            for finding in check_server(connection, profile):
                if facts is None or finding.check not in {"replication slots", "walsenders"}:
                    yield finding
            if facts is not None:
                yield from _check_free(connection, slot)
            yield from _check_membership(profile, facts, document, cid)
            if facts is not None:
                yield from _check_slot(facts, slot)
                yield from _check_publication(connection)
                yield from _check_guard(connection, document, cid)
                yield from _check_standby_names(connection, document, cid)
                yield from _check_schema(connection)
            yield from _check_sequences(connection, profile)
    except psycopg2.Error as error:
        raise UnreachableError(f"the database could not be checked ({str(error).strip()})") from error


def _check_free(connection: Connection, slot: SlotState) -> Iterator[Finding]:
    """Slots and walsenders of a node that has its own already: one more of each is for snapshots."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_replication_slots)::int, "
            "current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'walsender')::int"
        )
        row = cursor.fetchone()
    assert row is not None
    free_slots, free_senders = row
    for check, free, need, setting in (
        ("replication slots", free_slots, 1 + (not slot.exists), "max_replication_slots"),
        ("walsenders", free_senders, 1 + (slot.active_pid is None), "max_wal_senders"),
    ):
        yield Finding(check, True) if free >= need else Finding(
            check, False, f"{max(0, free)} {check} are free, {need} are needed",
            f"set {setting} higher by {need - free} or more and restart PostgreSQL",
        )  # fmt: skip


def _check_membership(
    profile: Profile, facts: NodeFacts | None, document: ClusterDocument | None, cid: int
) -> Iterator[Finding]:
    if facts is None and document is None:
        yield Finding("cluster", True, "no cluster is defined here", "`pmgcm create` or `pmgcm join`")
        return
    problem = remedy = ""
    if facts is None:
        problem, remedy = (
            "the database is not set up for the cluster, it was replaced or restored",
            "`pmgcm join` again",
        )
    elif document is None:
        problem = f"the database belongs to a cluster as node {facts.cid}, the state directory holds no cluster"
        remedy = "see that [node] state_dir in node.toml is right, or join again"
    elif (facts.cid, facts.cluster) != (cid, document.cluster):
        problem = f"the database is that of node {facts.cid} of a cluster, this node is {cid} of {document.name!r}"
        remedy = "see that the dsn in node.toml leads to this node's own database"
    yield Finding("cluster", not problem, problem, remedy)
    if facts is not None:
        yield Finding("profile", True) if facts.profile_digest == profile.digest else Finding(
            "profile", False, f"the profile {profile.name!r} has changed since this node was set up",
            "all nodes need the same one: put the old one back, or create the cluster anew",
        )  # fmt: skip


def _check_slot(facts: NodeFacts, slot: SlotState) -> Iterator[Finding]:
    problem = remedy = ""
    if not slot.exists:
        problem, remedy = f"the replication slot {facts.slot} is gone", RESTART_AGENT
    elif slot.plugin != "pgoutput":
        problem = f"the replication slot {facts.slot} uses the plugin {slot.plugin}"
        remedy = f"drop it: SELECT pg_drop_replication_slot('{facts.slot}'); the agent begins a new chain"
    elif slot.wal_status in {"lost", "unreserved"}:
        problem = f"the replication slot's wal_status is {slot.wal_status}"
        remedy = "see that capture keeps up, and raise max_slot_wal_keep_size"
    elif slot.active_pid is None:
        problem, remedy = "nobody reads the replication slot, pmgsync-agent does not capture", RESTART_AGENT
    elif slot.retained_bytes > RETAINED_BYTES:
        problem = f"the replication slot keeps {slot.retained_bytes >> 20} MiB of WAL"
        remedy = "see `pmgcm status` for what holds capture up; end transactions that have been open for long"
    yield Finding("slot", not problem, problem, remedy)
    if slot.system_id != facts.system_id:
        yield Finding(
            "server", False, "the database is on another server than when its chain began",
            "restart pmgsync-agent: it begins a new chain, and the other nodes resynchronise",
        )  # fmt: skip


_MEMBERS = """
WITH published AS (
    SELECT t.relid AS relation FROM pg_publication AS p, pg_get_publication_tables(p.pubname) AS t
    WHERE p.pubname = %s)
SELECT format('%%I.%%I', t.schema, t.name),
       CASE WHEN t.wanted AND p.relation IS NULL THEN 'missing'
            WHEN NOT t.wanted AND p.relation IS NOT NULL THEN 'extra'
            WHEN t.wanted AND NOT t.usable THEN 'keyless'
            WHEN t.policy <> 'local' AND NOT t.extension AND t.persistence = 'p' AND NOT t.wanted THEN 'virtual'
            WHEN t.policy <> 'local' AND NOT t.extension AND t.persistence = 'u' THEN 'unlogged' END
FROM pmgsync.tables AS t LEFT JOIN published AS p ON p.relation = t.relation ORDER BY 1
"""


def _check_publication(connection: Connection) -> Iterator[Finding]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.to_regclass('pmgsync.tables') IS NOT NULL")
        if cursor.fetchone() != (True,):
            yield Finding("watch", False, "the objects that watch new tables are missing", RESTART_AGENT)
            return
        cursor.execute(_MEMBERS, (PUBLICATION,))
        kinds: dict[str, list[str]] = {}
        for name, kind in cursor.fetchall():
            if kind is not None:
                kinds.setdefault(as_text(kind), []).append(as_text(name))
    yield (
        Finding("watch", True)
        if armed(connection)
        else Finding("watch", False, "the event triggers that watch new tables are missing or disabled", RESTART_AGENT)
    )
    texts = {
        "missing": ("publication", False, "tables of the profile are not in the publication", RESTART_AGENT),
        "extra": ("publication", False, "tables in the publication are not the profile's", RESTART_AGENT),
        "keyless": ("keys", False, "updates of tables fail, they have no usable key", RESTART_AGENT),
        "virtual": (
            "keys", False, "tables with a virtual generated column and no usable key cannot be published",
            "give them a primary key; their changes do not travel",
        ),
        "unlogged": (
            "unlogged", True, "changes of unlogged tables do not travel", "ALTER TABLE ... SET LOGGED where they should"
        ),
    }  # fmt: skip
    for kind, (check, ok, text, remedy) in texts.items():
        if kind in kinds:
            yield Finding(check, ok, f"{text}: {_names(kinds[kind])}", remedy)
    for check in ("publication", "keys"):
        if not any(kind in kinds for kind, entry in texts.items() if entry[0] == check):
            yield Finding(check, True)


def _check_guard(connection: Connection, document: ClusterDocument | None, cid: int) -> Iterator[Finding]:
    if document is None or not cid:
        return
    master, named = document.member(document.master), guarded_by(connection)
    problem = ""
    if document.master == cid:
        if named is not None:
            problem = f"this node is the master, its database still refuses writes in favour of {named}"
    elif named is None:
        problem = "this node is not the master, and its database takes writes to tables that the master writes"
    elif master is not None and named != master.name:
        problem = f"the database names {named} as master, it is {master.name}"
    elif open_tables := unguarded(connection):
        problem = f"tables that the master writes can be written here: {_names(open_tables)}"
    yield Finding("guard", not problem, problem, RESTART_AGENT if problem else "")


_OTHERS = """
SELECT datname FROM pg_catalog.pg_database
WHERE datallowconn AND NOT datistemplate AND datname <> pg_catalog.current_database() AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_db_role_setting AS s, pg_catalog.unnest(s.setconfig) AS one
    WHERE s.setdatabase = pg_database.oid AND s.setrole = 0
      AND one IN ('synchronous_commit=local', 'synchronous_commit=off'))
ORDER BY 1
"""


def _check_standby_names(connection: Connection, document: ClusterDocument | None, cid: int) -> Iterator[Finding]:
    """Whether commits on this server wait for slaves as the cluster is set to."""
    if document is None or not cid:
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.current_setting('synchronous_standby_names')")
        ((setting,),) = cursor.fetchall()
        cursor.execute(_OTHERS)
        others = [as_text(name) for (name,) in cursor.fetchall()]
    names, check = read_names(as_text(setting)), "synchronous mode"
    wanted = document.synchronous and document.master == cid
    if not wanted and names is Names.OURS:
        yield Finding(check, False, "commits on this server wait for capture, and need not", RESTART_AGENT)
    elif wanted and names in {Names.NONE, Names.OTHERS}:
        yield Finding(
            check, False, "commits here do not wait for slaves: synchronous_standby_names does not name capture",
            'add "pmgsync capture" to the names of your own standbys' if names is Names.OTHERS
            else "see `pmgcm status`: slaves may have been away for too long",
        )  # fmt: skip
    elif wanted and others:
        yield Finding(
            check, True, f"commits in other databases of this server wait for slaves too: {_names(others)}",
            "ALTER DATABASE … SET synchronous_commit = local, where they should not",
        )  # fmt: skip
    else:
        yield Finding(check, True)


def _check_schema(connection: Connection) -> Iterator[Finding]:
    """Tables that differ from another node's, and changes of the schema that could not be repeated here."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_catalog.format('%I.%I', schema, name), origin, reason FROM pmgsync.stale_table "
            "WHERE kind <> 'none' ORDER BY 1, 2"
        )
        stale = [tuple(map(_shown, row)) for row in cursor.fetchall()]
        cursor.execute("SELECT id, change, origin, error FROM pmgsync.schema_failure ORDER BY id")
        failures = [tuple(map(_shown, row)) for row in cursor.fetchall()]
    yield from () if stale or failures else (Finding("schema", True),)
    for table, origin, reason in stale:
        yield Finding(
            "schema", False, f"{table} is not kept in step with node {origin}: {reason}",
            "make the table as it is there; it is fetched by itself then",
        )  # fmt: skip
    for number, change, origin, error in failures:
        yield Finding(
            "schema", False, f"a change of the schema on node {origin} could not be repeated here: {change}: {error}",
            f"make it by hand, then DELETE FROM pmgsync.schema_failure WHERE id = {number}",
        )  # fmt: skip


def _shown(value: object) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


# Sequences that a column's default uses and that no column owns.
_LOOSE = """
SELECT DISTINCT sn.nspname, s.relname, n.nspname, c.relname, a.attname
FROM pg_depend AS d JOIN pg_class AS s ON s.oid = d.refobjid AND s.relkind = 'S'
JOIN pg_namespace AS sn ON sn.oid = s.relnamespace
JOIN pg_attrdef AS f ON d.classid = 'pg_attrdef'::regclass AND f.oid = d.objid
JOIN pg_class AS c ON c.oid = f.adrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_attribute AS a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
WHERE d.refclassid = 'pg_class'::regclass
  AND NOT EXISTS (SELECT FROM pg_depend AS o WHERE o.classid = 'pg_class'::regclass AND o.objid = s.oid
                  AND o.refclassid = 'pg_class'::regclass AND o.refobjsubid > 0 AND o.deptype IN ('a', 'i'))
ORDER BY 1, 2
"""


def _check_sequences(connection: Connection, profile: Profile) -> Iterator[Finding]:
    found = False
    with connection.cursor() as cursor:
        cursor.execute(_LOOSE)
        for row in cursor.fetchall():
            schema, sequence, table_schema, table, column = map(as_text, row)
            if covered(profile, (table_schema, table, column)) and not covered(profile, None):
                found = True
                place = f"{table_schema}.{table}.{column}"
                yield Finding(
                    "sequences", False,
                    f"the sequence {schema}.{sequence} gives {place} its values and does not follow the master's",
                    f"ALTER SEQUENCE {schema}.{sequence} OWNED BY {place}",
                )  # fmt: skip
    if not found:
        yield Finding("sequences", True)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
