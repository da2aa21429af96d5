"""The end of the chain of a node that was removed, as the worker that applies it brings it about on this node."""

from __future__ import annotations

import logging

from pmgsync.config import NodeConfig
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.profile import Profile
from pmgsync.postgres.setup.departing import forget_chain, left_out, replaced_tables
from pmgsync.postgres.setup.returning import fetch_from_master

log = logging.getLogger(__name__)


class ChainOverError(Exception):
    """The chain is to be forgotten, which is no fault; `lost`: its node's rows are fetched from the master first."""

    def __init__(self, *, lost: bool) -> None:
        super().__init__("the chain of a node that was removed is over")
        self.lost = lost


def end_chain(
    config: NodeConfig, profile: Profile, document: ClusterDocument, *, origin: int, own_cid: int, lost: bool
) -> None:
    """Forget a chain; doing it again changes nothing more.

    The master's copy stands for what was left out here, and for all of it when this node can have no more of the chain.

    Raises:
        UnreachableError: when the server does not answer; to be tried again.
    """
    if own_cid != document.master:
        if lost:
            tables = replaced_tables(
                config.dsn, profile, mirrored=origin in {entry.master for entry in document.history}
            )
        else:
            tables = left_out(config.dsn, origin)
        reason = f"node {origin} was removed, and not all that it wrote came here"
        fetch_from_master(config.dsn, document.master, tables, reason=reason)
    forget_chain(config.dsn, origin)
    log.info("action=chain-forgotten origin=%d lost=%s", origin, lost)
