"""Opening the file of a chain: what is sound of it is kept, a malformed file is salvaged or set aside."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from broker.journal import check as journal_check
from broker.journal import file as journal_file
from pmgsync.errors import JournalError, PmgsyncError


@dataclass(frozen=True, slots=True)
class Opened:
    """How opening a chain went.

    Attributes:
        lost: a file was there and nothing of it could be used; the chain begins anew where the caller said. On the own
            chain that is a break unless everyone is known to be at that position.
        notes: sentences about what was damaged and what was done, empty when all is well.
    """

    lost: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sound:
    """A file that can be continued: a connection that reads it, and what is sound of it."""

    reader: sqlite3.Connection
    found: journal_check.Inspection


def open_file(origin: int, incarnation: int, path: Path) -> tuple[Sound | None, Opened | None]:
    """Open a chain's file.

    Returns:
        What can be continued, None when there is no file or nothing of it can be used (then it was set aside); and how
        opening went, None when there is no file.

    Raises:
        JournalError: when the machine is at fault, not the file: nothing is thrown away then.
    """
    if not path.exists():
        return None, None
    notes: list[str] = []
    try:
        try:
            sound = _inspect(origin, incarnation, path)
        except (sqlite3.Error, TypeError, ValueError) as error:
            if journal_file.environmental(error):
                raise
            notes += journal_check.salvage(path, origin, incarnation)
            sound = _inspect(origin, incarnation, path)
    except (sqlite3.Error, PmgsyncError, OSError, TypeError, ValueError) as error:
        if journal_file.environmental(error):
            raise JournalError(
                f"the journal of origin {origin} cannot be opened ({error})",
                hint=f"look at the file system and the owner of {path}",
            ) from error
        aside = journal_check.set_aside(path)
        notes.append(f"journal of origin {origin}: the file cannot be used ({error}); it was renamed to {aside}")
        return None, Opened(lost=True, notes=tuple(notes))
    return sound, Opened(notes=(*notes, *sound.found.notes))


def _inspect(origin: int, incarnation: int, path: Path) -> Sound:
    if journal_check.suspect_path(path).exists():
        raise sqlite3.DatabaseError("its writer met damage")
    connection = journal_file.connect(path, synchronous="FULL")
    try:
        return Sound(connection, journal_check.inspect(connection, origin, incarnation))
    except BaseException:
        connection.close()
        raise
