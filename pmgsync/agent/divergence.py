"""The divergence worker: works off what this node has of a chain that does not count any more. It runs while there is
such a thing.

A stretch is worked off in steps, each of which may be done twice: find where it ends, export it, have the tables that
it touched fetched from the master, forget it. Until then nothing that the new master wrote to its tables is applied
here (`pmgsync.agent.apply`), so rows of two histories never meet.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace

from pmgsync.agent.export import Export, Held, held_of
from pmgsync.agent.worker import REPORT_S, Worker
from pmgsync.config import NodeConfig
from pmgsync.core.forks import forks_before
from pmgsync.core.positions import format_lsn
from pmgsync.core.stretches import Stretch
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.setup.facts import read_node
from pmgsync.postgres.setup.returning import (
    close_to_writes,
    fetch_from_master,
    mirrored_tables,
    positions,
    publish_again,
)
from pmgsync.postgres.wal.slot_reader import emit_barrier
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink

log = logging.getLogger(__name__)

NAME = "divergence"
POLL_S = 0.2
OLD_PATIENCE_S = 10.0
"""So long a transaction is waited for that may not see the guard. One that is open for longer mostly only reads, as
pg_dump does; should it write all the same, `pmgcm verify` shows what differs."""
JOURNAL_PATIENCE_S = 30.0
"""So long what a stretch should have may still come into the journal; after that the file says that it is missing."""


class DivergenceWorker(Worker):
    """Works off stretches, one after the other, and ends when there is none."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config, NAME)
        self._profile = load_profile(config.profile)
        self._files = DivergenceFiles(config.state_dir)
        self._begun: dict[str, float] = {}

    def session(self, link: BrokerLink) -> None:
        """Work until nothing is pending; the process ends then."""
        while True:
            pending = self._files.pending()
            if not pending:
                log.info("action=divergence-over")
                sys.exit(0)
            self.state = "S"
            self.alerts = [{"kind": "divergence", "text": f"{_label(one)} is being exported"} for one in pending]
            problem: PmgsyncError | None = None
            for stretch in pending:
                # Of a document that is stored, but not in force here yet, or that never came to be.
                if stretch.epoch <= self.document.epoch:
                    try:
                        self._work(link, stretch)
                    except UnreachableError as error:
                        problem = problem or error
            if problem is not None:
                # Another stretch may be what it waits for; so each is tried before it is said.
                raise problem
            self.recovered()
            self._pause(link)

    def _pause(self, link: BrokerLink) -> None:
        self.report()
        received = link.receive(min(POLL_S, REPORT_S))
        if received is not None:
            self.handle(*received)

    def _work(self, link: BrokerLink, stretch: Stretch) -> None:
        """Do what can be done of a stretch now."""
        held = held_of(link, stretch.origin)
        if stretch.upto is None:
            ended = self._ended(stretch)
            if ended is None:
                return
            if ended.empty and not ended.tables:
                self._files.done(stretch)
                return
            stretch = ended
            self._files.keep(stretch)
        assert stretch.upto is not None
        if not stretch.exported:
            if not self._in_journal(stretch, stretch.upto, held):
                return
            export = Export(link, self._files, self._profile, self.document, other=self.handle)
            tables, lost = export.run(stretch, held)
            touched = tuple(dict.fromkeys((*stretch.tables, *tables)))
            stretch = replace(stretch, tables=touched, lost=lost, exported=True)
            self._files.keep(stretch)
        self._fetch(stretch)
        self._files.done(stretch)

    def _ended(self, stretch: Stretch) -> Stretch | None:
        """Return the stretch with its end, None while that cannot be told."""
        document = self.document
        if stretch.origin != self.cid:
            if stretch.origin in document.cids | self.departed:
                return None  # its apply worker tells, before it applies more
            incarnation, lsn = positions(self.config.dsn).get(stretch.origin, (0, 0))
            return stretch.ended(lsn if incarnation == stretch.incarnation else 0)
        facts, _ = read_node(self.config.dsn)
        if facts.incarnation != stretch.incarnation:
            # The chain was begun anew since: what is not in the journal cannot be read any more.
            log.error("action=stretch-cut-off stretch=%s", stretch.id)
            return replace(stretch.ended(stretch.limit), lost=True)
        master = document.member(document.master)
        assert master is not None
        if master.cid == self.cid:
            # Master again: up to where its time began anew, if the history says that; else each one is judged.
            starts = [entry.start for entry in document.history if entry.master == self.cid and entry.start]
            later = [one.lsn for one in starts if one.incarnation == facts.incarnation and one.lsn > stretch.after]
            return stretch.ended(min(later) if later else emit_barrier(self.config.dsn))
        begun = self._begun.setdefault(stretch.id, time.monotonic())
        patient = time.monotonic() - begun < OLD_PATIENCE_S
        return stretch.ended(close_to_writes(self.config.dsn, self._profile, master, patient=patient))

    def _in_journal(self, stretch: Stretch, upto: int, held: Held) -> bool:
        """Return True when the journal has all of a stretch, or will not get it any more."""
        if held.incarnation == stretch.incarnation and held.whole < upto and not stretch.lost:
            begun = self._begun.setdefault(f"{stretch.id} journal", time.monotonic())
            return time.monotonic() - begun >= JOURNAL_PATIENCE_S
        return True

    def _fetch(self, stretch: Stretch) -> None:
        """Have the tables that a stretch touched fetched from the master; it has them as they count."""
        tables = list(stretch.tables)
        if stretch.lost:
            tables = list(dict.fromkeys((*tables, *mirrored_tables(self.config.dsn, self._profile))))
        if self.document.master == self.cid:
            publish_again(self.config.dsn, tables)
            return
        # What comes of the master's own chain is left out until the copy is there, which has all that was before.
        before = stretch.origin if stretch.origin not in {self.cid, self.document.master} else 0
        master, forks = self.document.master, forks_before(self.document.history)
        fetch_from_master(self.config.dsn, master, tables, before=before, after=stretch.after, forks=forks)


def _label(stretch: Stretch) -> str:
    return (
        f"what node {stretch.origin} wrote after {format_lsn(stretch.after)}, which does not count in epoch "
        f"{stretch.epoch},"
    )
