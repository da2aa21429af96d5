"""How far a copy is: a bar on a terminal, a line every few seconds without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cli.console import amount, duration, note, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 3.0


def estimate_left_s(done: int, total: int, elapsed_s: float) -> float | None:
    """Return the seconds left at the rate so far, None when nothing can be said yet."""
    if not done or elapsed_s <= 0:
        return None
    return max(0, total - done) * elapsed_s / done


class SnapshotProgress:
    """Shows bytes, rows, rate and time left. `total` is an estimate and may be overtaken.

    Attributes:
        what: what is copied.
        who: whose waiting is told of.
    """

    def __init__(self, what: str = "snapshot", who: str = "the master") -> None:
        self.what, self.who = what, who
        self.bytes = 0
        self.rows = 0
        self.total_bytes = 0
        self._waited: set[str] = set()
        self._begun = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn(self.what), BarColumn(), DownloadColumn(binary_units=True),
                TextColumn("{task.fields[rows]:,} rows"), TransferSpeedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(self.what, total=None, rows=0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            elapsed = time.monotonic() - self._begun
            note(f"{self.what}: {amount(self.bytes)}, {self.rows:,} rows in {elapsed:.1f} s")

    def waiting(self, what: str) -> None:
        """Tell once what the sender waits for before it can go on."""
        if what and what not in self._waited:
            self._waited.add(what)
            note(f"{self.who} waits for {printable(what)}")

    def show(self, done_bytes: int, rows: int, total_bytes: int) -> None:
        """Show how much has arrived, of about how much."""
        self.bytes, self.rows, self.total_bytes = done_bytes, rows, total_bytes
        self._show()

    def _show(self) -> None:
        total = max(self.total_bytes, self.bytes)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.bytes, total=total or None, rows=self.rows)
            return
        now = time.monotonic()
        if now - self._told < LINE_EVERY_S:
            return
        self._told = now
        elapsed = now - self._begun
        left = estimate_left_s(self.bytes, total, elapsed)
        note(
            f"{self.what}: {amount(self.bytes)} of about {amount(total)}, {self.rows:,} rows, "
            f"{amount(self.bytes / elapsed)}/s" + (f", about {duration(left)} left" if left is not None else "")
        )
