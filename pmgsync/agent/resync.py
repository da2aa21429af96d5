"""A resync: what one origin answers for is fetched anew as a snapshot and put in place in one transaction."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from pmgsync.config import NodeConfig
from pmgsync.core.membership import ClusterDocument
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.postgres.copy.chain_restore import ChainRestore
from pmgsync.wire.link import BrokerLink
from pmgsync.wire.snapshot import fetch_snapshot
from pmgsync.wire.waiting import Wakeup

log = logging.getLogger(__name__)


class Resync:
    """Runs in a thread of its own, with its own session, so that the worker goes on giving signs of life.

    Attributes:
        stale: when it is done, the tables of which something had to be left out.
    """

    def __init__(
        self,
        config: NodeConfig,
        profile: Profile,
        *,
        origin: int,
        own_cid: int,
        document: ClusterDocument,
        tables: Sequence[tuple[bytes, bytes]],
        wakeup: Wakeup,
    ) -> None:
        """Begin.

        Args:
            document: says who is master and who answers for which rows.
            tables: schema and name of those that are fetched; none: all that the origin answers for.
            wakeup: is called when it is over.
        """
        self.stale: frozenset[tuple[bytes, bytes]] = frozenset()
        self._config, self._profile = config, profile
        self._origin, self._own_cid, self._document = origin, own_cid, document
        self._tables = tables
        self._wakeup = wakeup
        self._cancelled = threading.Event()
        self._restore: ChainRestore | None = None
        self._error: PmgsyncError | None = None
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
        restore = self._restore
        rows, size = (restore.rows, restore.bytes) if restore is not None else (0, 0)
        names = [".".join(part.decode(errors="backslashreplace") for part in table) for table in self._tables]
        what = f"what of {', '.join(names)}" if names else "what"
        return f"resynchronising {what} node {self._origin} answers for: {rows} rows, {size >> 20} MiB received"

    def _run(self) -> None:
        try:
            self._fetch()
        except PmgsyncError as error:
            self._error = error
        except Exception as error:
            log.exception("action=resync-failed origin=%d", self._origin)
            self._error = PmgsyncError(f"the resync failed ({type(error).__name__}: {error})")
        finally:
            self._wakeup.wake()

    def _fetch(self) -> None:
        self._restore = restore = ChainRestore(
            self._config.dsn,
            self._profile,
            origin=self._origin,
            own_cid=self._own_cid,
            master=self._document.master,
            members=self._document.cids,
            tables=self._tables or None,
        )
        args: dict[str, Any] = {"scope": "chain", "origin": self._origin}
        if self._tables:
            args["tables"] = [list(table) for table in self._tables]
        try:
            with BrokerLink(self._config.broker_socket, f"resync:{self._origin}") as link:
                link.hello()
                result = fetch_snapshot(link, args, restore, target=self._origin, on_message=self._check_cancelled)
            self.stale = frozenset(restore.stale)
            log.info("action=resynced origin=%d result=%s", self._origin, result)
        finally:
            restore.close()

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise UnreachableError("the resync was given up")
