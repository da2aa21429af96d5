"""A resync: what one origin answers for is fetched anew as a snapshot and put in place in one transaction."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pmgsync.agent.worker import Bell
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.copy.database_restore import ChainRestore
from pmgsync.profile_file import load_profile
from pmgsync.wire.link import BrokerLink

if TYPE_CHECKING:
    from pmgsync.agent.apply import ApplyWorker

log = logging.getLogger(__name__)


class Resync:
    """Runs in a thread of its own, with its own session, so that the worker goes on giving signs of life.

    Attributes:
        stale: when it is done, the tables of which something had to be left out.
    """

    def __init__(self, worker: ApplyWorker, bell: Bell, tables: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._worker = worker
        self._bell = bell
        self._tables = tables
        self._cancelled = threading.Event()
        self._error: PmgsyncError | None = None
        self._rows = self._bytes = 0
        self.stale: frozenset[tuple[bytes, bytes]] = frozenset()
        self._thread = threading.Thread(target=self._run, name="resync", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """True when it is done or has failed."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Return when it went well.

        Raises:
            PmgsyncError: when it did not; the database is as it was.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Give up; the transaction is rolled back."""
        self._cancelled.set()

    def progress(self) -> str:
        """Return a sentence on how far it has come."""
        return (
            f"resynchronising {self._what()} node {self._worker.origin} answers for: "
            f"{self._rows} rows, {self._bytes >> 20} MiB received"
        )

    def _what(self) -> str:
        names = [".".join(part.decode(errors="backslashreplace") for part in table) for table in self._tables]
        return f"what of {', '.join(names)}" if names else "what"

    def _run(self) -> None:
        try:
            self._fetch()
        except PmgsyncError as error:
            self._error = error
        except Exception as error:
            log.exception("action=resync-failed origin=%d", self._worker.origin)
            self._error = PmgsyncError(f"the resync failed ({type(error).__name__}: {error})")
        finally:
            self._bell.ring()

    def _fetch(self) -> None:
        worker = self._worker
        restore = ChainRestore(
            worker.config.dsn,
            load_profile(worker.config.profile),
            origin=worker.origin,
            own_cid=worker.cid,
            master=worker.document.master,
            members=worker.document.cids,
            tables=self._tables or None,
        )
        try:
            with BrokerLink(worker.config.broker_socket, f"resync:{worker.origin}") as link:
                link.hello()
                args: dict[str, Any] = {"scope": "chain", "origin": worker.origin}
                if self._tables:
                    args["tables"] = [list(table) for table in self._tables]
                for message, parts in link.call("snapshot", args, target=worker.origin):
                    if self._cancelled.is_set():
                        raise UnreachableError("the resync was given up")
                    if message["op"] == "done":
                        restore.finish(message["result"])
                        self.stale = frozenset(restore.stale)
                        log.info("action=resynced origin=%d result=%s", worker.origin, message["result"])
                        return
                    piece = message["piece"]
                    if piece["kind"] != "wait":
                        restore.feed(piece, parts[0] if parts else None)
                    if piece["kind"] == "rows":
                        self._bytes += len(parts[0])
                        self._rows += parts[0].count(b"\n")
        finally:
            restore.close()
