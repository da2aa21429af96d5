"""The snapshot worker: answers other nodes' calls for snapshots and facts, as fast as their credit allows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pmgsync.agent import divergence_reads, row_checks
from pmgsync.agent.serving import Serving
from pmgsync.agent.worker import REPORT_S, Worker
from pmgsync.config import NodeConfig
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, ProtocolError
from pmgsync.postgres.copy.take import take_chain_snapshot, take_database_snapshot
from pmgsync.postgres.setup.facts import read_facts, read_node
from pmgsync.postgres.setup.returning import incomplete_tables
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, error_map
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
        self._serving: dict[int, Serving] = {}

    def session(self, link: BrokerLink) -> None:
        """Answer calls until something ends the session."""
        link.send(
            {"op": "serve", "methods": ["snapshot", "facts", INCOMPLETE, *row_checks.METHODS, divergence_reads.METHOD]}
        )
        waiter = Waiter(link.socket, wakeup=self.wakeup)
        try:
            while True:
                waiter.wait(REPORT_S)
                for received in link.pending():
                    self._take(link, *received)
                for request in list(self._serving):
                    self._send(link, request)
                self.recovered()
                self.report()
        finally:
            for serving in self._serving.values():
                serving.cancel()
            self._serving.clear()

    def keeps_session(self, data: bytes) -> bool:
        """A snapshot that is under way goes on whatever changes in the cluster, unless this node leaves it."""
        super().keeps_session(data)
        return bool(data) and self.document.member(self.cid) is not None

    def _take(self, link: BrokerLink, message: Message, attachments: Sequence[bytes]) -> None:
        request = int(message.get("id", 0))
        match message["op"]:
            case "call":
                try:
                    self._begin(link, request, message)
                except PmgsyncError as error:
                    link.send(error_map(request, error))
            case "credit" if request in self._serving:
                self._serving[request].add_credit(int(message["bytes"]))
            case "cancel" if request in self._serving:
                self._serving.pop(request).cancel()
                log.info("action=snapshot-cancelled id=%d", request)
            case "credit" | "cancel":
                pass
            case _:
                self.handle(message, attachments)

    def _begin(self, link: BrokerLink, request: int, message: Message) -> None:
        method, args = message["method"], message.get("args", {})
        if method == "facts":
            link.send({"op": "done", "id": request, "result": read_facts(self.config.dsn, self._profile)})
            return
        if method == INCOMPLETE:
            if type(origin := args.get("origin")) is not int:
                raise ProtocolError(f"{INCOMPLETE} names no origin")
            link.send({"op": "done", "id": request, "result": {"tables": incomplete_tables(self.config.dsn, origin)}})
            return
        credit = int(message.get("credit", 0))
        if method in row_checks.METHODS:
            pieces = row_checks.answer_rows(method, args, self.config.dsn, self._profile)
            self._serving[request] = Serving(pieces, credit, self.wakeup)
            return
        if method == divergence_reads.METHOD:
            pieces = divergence_reads.answer_divergence(args, DivergenceFiles(self.config.state_dir))
            self._serving[request] = Serving(pieces, credit, self.wakeup)
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
        self._serving[request] = Serving(pieces, credit, self.wakeup)

    def _send(self, link: BrokerLink, request: int) -> None:
        serving = self._serving[request]
        if serving.send(link, request):
            del self._serving[request]
            result = serving.result
            if result is not None and "bytes" in result:
                log.info("action=snapshot-done id=%d rows=%s bytes=%s", request, result["rows"], result["bytes"])
