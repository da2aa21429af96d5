"""The snapshot worker: answers other nodes' calls for snapshots and facts, as fast as their credit allows."""

from __future__ import annotations

import logging
from functools import partial

from pmgsync.agent import divergence_reads, row_checks
from pmgsync.agent.serving import Serving, Servings
from pmgsync.agent.worker import REPORT_S, Worker
from pmgsync.config import NodeConfig
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import ProtocolError
from pmgsync.postgres.copy.take import take_chain_snapshot, take_database_snapshot
from pmgsync.postgres.setup.facts import read_facts, read_node
from pmgsync.postgres.setup.returning import incomplete_tables
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message
from pmgsync.wire.waiting import Waiter

log = logging.getLogger(__name__)

INCOMPLETE = "tables.incomplete"


def _tables(given: object) -> set[tuple[bytes, bytes]] | None:
    if given is None:
        return None
    if isinstance(given, list):
        pairs = {(pair[0], pair[1]) for pair in given if isinstance(pair, list) and len(pair) == 2}
        if len(pairs) == len(given) and all(isinstance(part, bytes) for pair in pairs for part in pair):
            return pairs
    raise ProtocolError(f"a snapshot was asked for of the tables {given!r:.100}")


class SnapshotWorker(Worker):
    """Serves snapshots, and what else is asked of this node's database."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config, "snapshot")
        self._profile = load_profile(config.profile)
        self._serving = Servings(self.wakeup)

    def session(self, link: BrokerLink) -> None:
        """Answer calls until something ends the session."""
        link.send(
            {"op": "serve", "methods": ["snapshot", "facts", INCOMPLETE, *row_checks.METHODS, divergence_reads.METHOD]}
        )
        waiter = Waiter(link, wakeup=self.wakeup)
        try:
            while True:
                waiter.wait(REPORT_S)
                for message, attachments in link.pending():
                    if not self._serving.take(link, message, partial(self._begin, link)):
                        self.handle(message, attachments)
                for request, serving in self._serving.send(link).items():
                    _log_end(request, serving)
                self.recovered()
                self.report()
        finally:
            self._serving.close()

    def keeps_session(self, data: bytes) -> bool:
        """A snapshot that is under way goes on whatever changes in the cluster, unless this node leaves it."""
        super().keeps_session(data)
        return bool(data) and self.document.member(self.cid) is not None

    def _begin(self, link: BrokerLink, message: Message) -> None:
        request = int(message.get("id", 0))
        method, args = message["method"], message.get("args", {})
        if method == "facts":
            link.send({"op": "done", "id": request, "result": read_facts(self.config.dsn, self._profile)})
            return
        if method == INCOMPLETE:
            if type(origin := args.get("origin")) is not int:
                raise ProtocolError(f"{INCOMPLETE} names no origin")
            link.send({"op": "done", "id": request, "result": {"tables": incomplete_tables(self.config.dsn, origin)}})
            return
        if method in row_checks.METHODS:
            pieces = row_checks.answer_rows(method, args, self.config.dsn, self._profile)
            self._serving.begin(message, pieces)
            return
        if method == divergence_reads.METHOD:
            pieces = divergence_reads.answer_divergence(args, DivergenceFiles(self.config.state_dir))
            self._serving.begin(message, pieces)
            return
        facts, _ = read_node(self.config.dsn)
        own = (self.cid, facts.incarnation)
        match args:
            case {"scope": "database"}:
                pieces = take_database_snapshot(self.config.dsn, self._profile, own=own)
            case {"scope": "chain", "origin": int(origin)}:
                pieces = take_chain_snapshot(
                    self.config.dsn,
                    self._profile,
                    origin=origin,
                    own=own,
                    master=self.document.master,
                    members=self.document.cids,
                    tables=_tables(args.get("tables")),
                )
            case _:
                raise ProtocolError(f"a snapshot was asked for with {args!r:.100}")
        log.info("action=snapshot id=%d caller=%s args=%s", request, message.get("caller"), args)
        self._serving.begin(message, pieces)


def _log_end(request: int, serving: Serving) -> None:
    result = serving.result
    if result is not None and "bytes" in result:
        log.info("action=snapshot-done id=%d rows=%s bytes=%s", request, result["rows"], result["bytes"])
