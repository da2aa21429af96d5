"""What a node remembers of its trees between two runs: entries, stamps, and facts about each tree; an SQLite file."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack

from pmgsync.core.manifests import Entry, Manifest
from pmgsync.files.directories import FilesError
from pmgsync.files.scan import Found, Stamp

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    tree TEXT NOT NULL, part TEXT NOT NULL, name BLOB NOT NULL, entry BLOB NOT NULL, inode INTEGER, changed INTEGER,
    PRIMARY KEY (tree, part, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (
    tree TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (tree, key)) WITHOUT ROWID;
"""

Row = tuple[bytes, Entry | None, Stamp | None]


class Cache:
    """The file; several threads may use it. It only saves work: without it, everything is hashed and compared again.

    A part is `seen` (what this node's disk has) or `held` (what was put in place from the owner).

    Attributes:
        most: by tree, how many files it had at most of late, and when that was (monotonic seconds). Not in the file: it
            outlives a tree that is opened anew, not the process.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or begin a new one when it is damaged.

        Raises:
            FilesError: when it cannot be written.
        """
        self.most: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = self._open()
        except (sqlite3.OperationalError, OSError) as error:
            raise FilesError(f"cannot write {path} ({error})") from error

    def _open(self) -> sqlite3.Connection:
        # SQLite would make it for everybody to read; its other files take their mode from this one.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            # A power cut may take the newest rows: they are found again by their stamps, or fetched again by digest.
            database.execute("PRAGMA synchronous = NORMAL")
            database.executescript(_SCHEMA)
        except sqlite3.OperationalError:
            database.close()
            raise
        except sqlite3.DatabaseError:
            database.close()
            for end in ("", "-wal", "-shm"):
                Path(f"{self._path}{end}").unlink(missing_ok=True)
            return self._open()
        return database

    def close(self) -> None:
        """Close it."""
        with self._lock:
            self._database.close()

    def begin(self, membership: str) -> None:
        """Forget everything that was known in another membership, also of a cluster before.

        What was put in place then says nothing about what a new owner has deleted: it would be removed here.

        Raises:
            FilesError: when it cannot be written.
        """
        if self.fact("", "membership") == membership:
            return
        with self._transaction():
            self._database.execute("DELETE FROM entry")
            self._database.execute("DELETE FROM fact")
        self.most.clear()
        self.note("", "membership", membership)

    def seen(self, tree: str) -> Found:
        """Return what the disk had when it was last looked at."""
        found = Found()
        for name, entry, inode, changed in self._rows(tree, "seen"):
            found.set(name, entry, None if inode is None else (inode, changed or 0))
        return found

    def held(self, tree: str) -> Manifest:
        """Return what was put in place from the owner."""
        return Manifest((name, entry) for name, entry, _, _ in self._rows(tree, "held"))

    def _rows(self, tree: str, part: str) -> list[tuple[bytes, Entry, int | None, int | None]]:
        with self._lock:
            found = self._database.execute(
                "SELECT name, entry, inode, changed FROM entry WHERE tree = ? AND part = ?", (tree, part)
            ).fetchall()
        return [(bytes(name), Entry(*msgpack.unpackb(entry)), inode, changed) for name, entry, inode, changed in found]

    def write(self, tree: str, part: str, rows: Iterable[Row]) -> None:
        """Note rows in one transaction; an entry None forgets the name.

        Raises:
            FilesError: when they cannot be written.
        """
        gone, new = [], []
        pack = msgpack.Packer().pack
        for name, entry, stamp in rows:
            if entry is None:
                gone.append((tree, part, name))
            else:
                inode, changed = stamp or (None, None)
                new.append((tree, part, name, pack(entry), inode, changed))
        if not gone and not new:
            return
        with self._transaction():
            self._database.executemany("DELETE FROM entry WHERE tree = ? AND part = ? AND name = ?", gone)
            self._database.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, ?)", new)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run what is in the block in one transaction.

        Raises:
            FilesError: when it cannot be written; then nothing of it is.
        """
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise FilesError(
                    f"cannot write {self._path} ({error})", hint="make room; it goes on by itself"
                ) from error

    def fact(self, tree: str, key: str) -> str:
        """Return a fact about a tree, "" when nothing was noted."""
        with self._lock:
            row = self._database.execute("SELECT value FROM fact WHERE tree = ? AND key = ?", (tree, key)).fetchone()
        return str(row[0]) if row else ""

    def facts(self, tree: str) -> list[str]:
        """Return the keys of all facts about a tree."""
        with self._lock:
            return [str(key) for (key,) in self._database.execute("SELECT key FROM fact WHERE tree = ?", (tree,))]

    def forget_fact(self, tree: str, key: str) -> None:
        """Forget one fact about a tree.

        Raises:
            FilesError: when it cannot be written.
        """
        with self._lock:
            try:
                self._database.execute("DELETE FROM fact WHERE tree = ? AND key = ?", (tree, key))
            except sqlite3.Error as error:
                raise FilesError(
                    f"cannot write {self._path} ({error})", hint="make room; it goes on by itself"
                ) from error

    def note(self, tree: str, key: str, value: str) -> None:
        """Note a fact about a tree.

        Raises:
            FilesError: when it cannot be written.
        """
        with self._lock:
            try:
                self._database.execute("INSERT OR REPLACE INTO fact VALUES (?, ?, ?)", (tree, key, value))
            except sqlite3.Error as error:
                raise FilesError(
                    f"cannot write {self._path} ({error})", hint="make room; it goes on by itself"
                ) from error
