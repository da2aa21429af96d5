"""The row in pmgsync.node: what a database says of its node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg2.extensions

from pmgsync.core.emitted import SealKey
from pmgsync.core.positions import parse_lsn
from pmgsync.postgres.catalog import as_text

Connection = psycopg2.extensions.connection


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the database says of its node.

    Attributes:
        start: the commit LSN that the chain begins after: `Position(start)` is before its first transaction.
        needs_snapshot: True when who does not know this incarnation needs a snapshot.
        system_id: the server's identifier when the chain began.
        seal_key: what the database seals pmgsync's own messages with.
    """

    cid: int
    incarnation: int
    start: int
    system_id: str
    timeline: int
    slot: str
    publication: str
    needs_snapshot: bool
    cluster: bytes
    profile_digest: str
    seal_key: SealKey


_NODE = """
SELECT cid, incarnation, start_lsn::text, system_id, timeline, slot, publication, needs_snapshot, cluster,
       profile_digest, inner_key, outer_key
FROM pmgsync.node, pmgsync.seal_key WHERE start_lsn IS NOT NULL
"""


def node_facts(connection: Connection) -> NodeFacts | None:
    """Return what the database says of its node, None when it was not provisioned, or not to the end.

    Raises:
        psycopg2.Error: when the server does not answer.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.to_regclass('pmgsync.node')::oid::bigint")
        if cursor.fetchone() == (None,):
            return None
        cursor.execute(_NODE)
        row = cursor.fetchone()
    if row is None:
        return None
    values: list[Any] = [as_text(value) if isinstance(value, bytes) else value for value in row]
    cid, incarnation, start, system_id, timeline, slot, publication, needs_snapshot, cluster, digest, inner, outer = (
        values
    )
    # A commit record may stand at the consistent point itself; it is the chain's first, so the chain begins before it.
    return NodeFacts(
        cid, incarnation, parse_lsn(start) - 1, system_id, timeline, slot, publication, needs_snapshot,
        bytes(cluster), digest, SealKey(bytes(inner), bytes(outer)),
    )  # fmt: skip
