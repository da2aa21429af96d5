"""A backup's file: written beside its place and renamed when whole, read as often as needed from one descriptor."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from broker.files import is_open
from cli.console import ask_secret, note
from pmgsync.core.backups import Contents, Record, pack_records, unpack_records
from pmgsync.core.sealing import SALT_BYTES, is_encrypted, open_chunks, seal_chunks
from pmgsync.errors import ConfigError, DamagedFileError, PmgsyncError
from pmgsync.private_files import sync_directory

WITHOUT_TERMINAL = "give --passphrase-file"


def new_passphrase(path: Path | None, *, encrypt: bool) -> bytes | None:
    """Return the passphrase for a new backup, from a file or asked twice; None when it is not to be encrypted.

    Raises:
        ConfigError: when it is empty, or the file cannot be read.
        PmgsyncError: when nobody can be asked, or what was typed differs.
    """
    if path is not None:
        return _from_file(path)
    if not encrypt:
        return None
    typed = ask_secret("passphrase of the new backup", without_terminal=WITHOUT_TERMINAL)
    if not typed:
        raise ConfigError("the passphrase is empty")
    if ask_secret("the same passphrase again", without_terminal=WITHOUT_TERMINAL) != typed:
        raise PmgsyncError("the two differ, nothing was written")
    return typed.encode("utf-8", "surrogateescape")


def known_passphrase(path: Path | None) -> Callable[[], bytes]:
    """Return what gives the passphrase of a backup that is there; a person is asked at most once."""

    @cache
    def give() -> bytes:
        if path is not None:
            return _from_file(path)
        typed = ask_secret("passphrase of the backup", without_terminal=WITHOUT_TERMINAL)
        return typed.encode("utf-8", "surrogateescape")

    return give


def _from_file(path: Path) -> bytes:
    try:
        if is_open(path):
            note(f"note: other users can get at {path}; chmod 600 closes it")
        with path.open("rb") as file:
            found = file.readline().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"the passphrase file {path} cannot be read ({error.strerror})") from error
    if not found:
        raise ConfigError(f"the passphrase file {path} has no passphrase in its first line")
    return found


def write_backup(path: Path, records: Iterable[Record], passphrase: bytes | None, *, overwrite: bool) -> int:
    """Write a backup, for this user only, and return its size; until it is whole and on disk nothing is at its place.

    Raises:
        ConfigError: when it cannot be written, or something is there that is not to be overwritten.
    """
    if not overwrite and os.path.lexists(path):
        raise ConfigError(f"{path} is there already", hint="choose another name, or add --overwrite")
    secret = None if passphrase is None else (passphrase, os.urandom(SALT_BYTES))
    temporary = ""
    try:
        # mkstemp makes it for this user only.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in seal_chunks(pack_records(records), secret):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        Path(temporary).replace(path)
        temporary = ""
        sync_directory(path.parent)
    except OSError as error:
        raise ConfigError(
            f"the backup {path} cannot be written ({error.strerror})",
            hint="make room there, or see that the directory exists and this user may write it",
        ) from error
    finally:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
    return size


class BackupFile:
    """A backup that is read. Use it as a context manager.

    Attributes:
        path: where it is.
        size: bytes.
    """

    def __init__(self, path: Path, passphrase: Callable[[], bytes]) -> None:
        """Open it.

        Raises:
            ConfigError: when it cannot be read.
        """
        self.path = path
        self._passphrase = passphrase
        try:
            self._file: BinaryIO = path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise ConfigError(f"the backup {path} cannot be read ({error.strerror})") from error

    def __enter__(self) -> BackupFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def encrypted(self) -> bool:
        """True when it asks for a passphrase.

        Raises:
            ProtocolError: when it is no backup.
        """
        self._file.seek(0)
        return is_encrypted(self._read)

    def records(self) -> Iterator[Record]:
        """Yield its records from the first one on, each chunk proved.

        Raises:
            PmgsyncError: when it is damaged, cannot be read, or asks for another passphrase.
        """
        self._file.seek(0)
        return unpack_records(open_chunks(self._read, self._passphrase))

    def check(self) -> Contents:
        """Read all of it, and return what is in it.

        Raises:
            PmgsyncError: when it is damaged, not whole, or asks for another passphrase.
        """
        contents = Contents()
        for record, attachment in self.records():
            contents.take(record, attachment)
        if not contents.complete:
            raise DamagedFileError("the backup has no end", hint="take another copy of it")
        return contents

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise ConfigError(f"the backup {self.path} cannot be read ({error.strerror})") from error
