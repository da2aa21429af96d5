"""What this node may have that does not count under a document that it is about to take."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from broker.leadership.leadership import Leadership
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.stretches import stretches_between
from pmgsync.divergence_files import DivergenceFiles

log = logging.getLogger(__name__)


def note_left_behind(
    divergence: DivergenceFiles,
    held: ClusterDocument,
    taken: ClusterDocument,
    *,
    cid: int,
    lives: Mapping[int, Collection[int]],
    leading: Leadership | None,
) -> None:
    """Write it down, before the document is taken: afterwards the old history is gone.

    Args:
        held: the document in force.
        cid: this node's number.
        lives: incarnations of each chain that are known here, by origin.
        leading: knows how far this node's own chain and the held master's were taken over; None outside a cluster.

    Raises:
        ConfigError: when it cannot be written: then the document is not taken.
    """
    member = held.member(cid)
    if member is None or member.role == "witness":
        return  # it has no database
    found = stretches_between(held.history, taken.history, node=cid, lives=lives)
    if leading is not None:
        leads = taken.master == cid
        found = tuple(leading.trimmed(one, leads=leads and one.origin == held.master) for one in found)
    divergence.note(found)
    for stretch in found:
        log.info("action=stretch id=%s what=%s", stretch.id, stretch.what)
