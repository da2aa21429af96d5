"""Actions for tables: when PostgreSQL has counted writes to one, what the profile asks for is run."""

from __future__ import annotations

import logging
import threading

from pmgsync.agent.actions import Actions
from pmgsync.core.profile import Profile
from pmgsync.errors import PmgsyncError
from pmgsync.files.cache import Cache
from pmgsync.postgres.write_counters import WriteCounters

log = logging.getLogger(__name__)

LOOK_S = 1.0
_SEEN = "tables"
"""Where the cache has the counts; no tree is called so."""


class TableActions:
    """Looks once a second, in a thread of its own; not on the master, whose tables are written by the gateway itself.

    The counts that were seen are on disk, and only after what they ask for is: a crash runs an action once more.
    """

    def __init__(self, dsn: str, profile: Profile, cache: Cache, actions: Actions) -> None:
        self._counters = WriteCounters(dsn, {table for action in profile.actions for table in action.tables})
        self._cache = cache
        self._actions = actions
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="table actions", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and return when it has."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self._look()
            except PmgsyncError as error:
                # The workers that need the database say so in status.
                log.info("action=no-counts error=%s", error)
        self._counters.close()

    def _look(self) -> None:
        counts = self._counters.read()
        changed = {table: count for table, count in counts.items() if self._cache.fact(_SEEN, table) != count}
        if not changed:
            return
        # A table that was never looked at before is as it was copied.
        commands = self._actions.expect(tables=[table for table in changed if self._cache.fact(_SEEN, table)])
        for table, count in changed.items():
            self._cache.note(_SEEN, table, count)
        self._actions.request(commands)
