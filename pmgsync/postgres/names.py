"""The names of what pmgsync makes on a server beside its schema: a slot, a publication, an origin for each node."""

from __future__ import annotations

SLOT = PUBLICATION = "pmgsync"
ORIGIN_PREFIX = "pmgsync_"
CAPTURE = "pmgsync capture"
"""The application_name of capture's replication connection, by which synchronous_standby_names knows it."""
SET_UP_ORIGIN = "pmgsync_0"
"""Marks what provisioning writes to user tables, so that capture takes it for somebody else's; no node has CID 0."""


def origin_name(cid: int) -> str:
    """Return the name of the replication origin under which a node's chain is applied."""
    return f"{ORIGIN_PREFIX}{cid}"
