"""How a join ends: the newcomer says that its copy is in place, and the master makes it a full member or removes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from broker.cluster.documents import Documents
from broker.cluster.joiners import Joiners
from broker.cluster.tokens import Tokens
from broker.members.members import Members
from pmgsync.core.membership import ClusterDocument, with_confirmed, without_member
from pmgsync.errors import PmgsyncError

log = logging.getLogger(__name__)

CONFIRM_S = 1.0
"""So often a node whose copy is in place says so to the master, until the document calls it a member."""


class Joins:
    """Ends joins: on the newcomer by asking for it, on the master by doing it."""

    def __init__(
        self,
        cid: int,
        joiners: Joiners,
        documents: Documents,
        tokens: Tokens,
        members: Members,
        *,
        change_document: Callable[[ClusterDocument], object],
        new_id: Callable[[], int],
    ) -> None:
        """Begin; `change_document` signs, stores and spreads a new document."""
        self._cid = cid
        self._joiners = joiners
        self._documents = documents
        self._tokens = tokens
        self._members = members
        self._change_document = change_document
        self._new_id = new_id
        self._confirm_at = 0.0

    def tick(self) -> None:
        """Do what is due."""
        document = self._documents.document
        if document.master == self._cid:
            for cid in self._joiners.silent():
                try:
                    self.give_up(cid)
                except PmgsyncError as error:
                    # A disk that is full must not end the broker; the next tick tries again.
                    log.warning("action=join-not-given-up cid=%d error=%s", cid, error)
        elif self._cid in document.joining and time.monotonic() >= self._confirm_at:
            self._confirm_at = time.monotonic() + CONFIRM_S
            self._members.send(document.master, {"op": "join.done", "id": self._new_id()})

    def confirm(self, cid: int) -> None:
        """Make a joining node a full member; its copy is in place."""
        document = self._documents.master_document()
        self._change_document(with_confirmed(document, cid))
        if (member := document.member(cid)) is not None:
            self._tokens.forget(member.curve_key)

    def give_up(self, cid: int) -> None:
        """Remove a node that has not come as far as to be a member; one that has is left alone."""
        document = self._documents.master_document()
        if cid in document.joining:
            log.warning("action=join-given-up cid=%d", cid)
            self._change_document(without_member(document, cid))
