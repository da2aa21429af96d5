"""Looks now and then at the level of this node's subscription, in a thread: the program that says it may take long."""

from __future__ import annotations

import logging
import threading

from pmgsync.config import Subscription
from pmgsync.errors import ConfigError
from pmgsync.subscription import read_level

log = logging.getLogger(__name__)

LOOK_S = 60.0


class LevelWatch:
    """The level as it was last read.

    Attributes:
        level: "" when it is not known.
        problem: why it cannot be read, "" when it can.
    """

    def __init__(self, subscription: Subscription) -> None:
        self.level = ""
        self.problem = ""
        self._subscription = subscription
        self._thread = threading.Thread(target=self._run, name="level", daemon=True)

    def start(self) -> None:
        """Begin, when node.toml says where the level is found."""
        if self._subscription != Subscription():
            self._thread.start()

    def alerts(self) -> list[dict[str, str]]:
        """Return what an administrator should know."""
        return [{"kind": "subscription", "text": self.problem}] if self.problem else []

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self.look()
            pause.wait(LOOK_S)

    def look(self) -> None:
        """Read the level now."""
        try:
            self.level, self.problem = read_level(self._subscription), ""
        except ConfigError as error:
            if error.message != self.problem:
                log.warning("action=level-unknown error=%s", error)
            self.problem = error.message
