"""The demo's live view: the status table on a terminal, a line every few seconds without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cli.console import note
from cli.status import render

if TYPE_CHECKING:
    from rich.live import Live

LINE_EVERY_S = 3.0


class Display:
    """Shows how the demo goes on; all of it on stderr, so that the summary stands alone on stdout."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Mapping[str, Any] | None, progress: str) -> None:
        """Show a status map (None: the broker gave none just now) and a line about the load."""
        if self._live is not None:
            from rich.text import Text

            lines = render(status) if status else ["the broker of the first node gives no status now"]
            self._live.update(Text("\n".join([*lines, "", progress])), refresh=True)
        elif time.monotonic() - self._told >= LINE_EVERY_S:
            self._told = time.monotonic()
            states = " ".join(f"{node['name']}={node['state']}" for node in status["nodes"]) if status else "no status"
            note(f"{progress}; {states}")
