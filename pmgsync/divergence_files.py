"""The files of what diverged, in a directory of their own: stretches that are pending, and exports that are done.

A stretch is `ID.json`, its export `ID.jsonl` (`pmgsync.core.divergence`). The broker writes stretches, the agent works
them off, and the command line shows and removes exports. Everything is replaced as a whole or not at all. Files of a
configuration that this node had as master are in directories `files-TIME`, below the name of their tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pmgsync.core.divergence import DivergenceFile, read_lines
from pmgsync.core.stretches import Stretch
from pmgsync.errors import ConfigError, PmgsyncError, ProtocolError
from pmgsync.private_files import sync_directory, write_private

DIRECTORY = "divergence"
MAX_LINE = 64 << 10
PENDING, EXPORT = ".json", ".jsonl"
_FILES_ID = re.compile(r"files-\d{8}T\d{6}")
_ID = re.compile(r"\d+-\d+-\d+-[0-9a-f]{4}-[0-9a-f]+(-gained)?")


@dataclass(frozen=True, slots=True)
class Export:
    """An export that is done.

    Attributes:
        id: as in `Stretch.id`.
        file: what it holds.
    """

    id: str
    path: Path
    file: DivergenceFile


def node_of(name: str) -> int:
    """Return the CID of the node that has a stretch of this name.

    Raises:
        ConfigError: when it is none.
    """
    if not _ID.fullmatch(name):
        raise ConfigError(f"{name!r:.80} is no divergence", hint="`pmgcm divergence list` shows what there is")
    return int(name.split("-")[1])


class Draft:
    """An export in the making.

    Attributes:
        lines: how many there are.
        kept: it is to be kept.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.lines = 0
        self.kept = False

    def write(self, line: str) -> None:
        """Add a line."""
        self._file.write(line + "\n")
        self.lines += 1

    def place(self) -> tuple[int, int]:
        """Return where it ends now."""
        return self._file.tell(), self.lines

    def back_to(self, place: tuple[int, int]) -> None:
        """Forget what was added since."""
        offset, self.lines = place
        self._file.seek(offset)
        self._file.truncate()

    def keep(self) -> None:
        """Have it take its place."""
        self.kept = True


class DivergenceFiles:
    """The directory; it need not be there while nothing has diverged."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / DIRECTORY
        self._told: tuple[list[str], list[dict[str, str]]] = [], []

    # -- stretches that are pending -----------------------------------------------------------------------------------

    def pending(self) -> list[Stretch]:
        """Return the stretches that are not worked off yet, the oldest epoch first.

        Raises:
            ConfigError: when one cannot be read: what it says would be lost without a word.
        """
        found = []
        for path in self._paths(PENDING):
            try:
                found.append(Stretch.from_json(path.read_bytes()))
            except FileNotFoundError:
                continue  # worked off since the directory was read
            except (OSError, ProtocolError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else error.message})",
                    hint="it names changes that do not count any more; run `pmgcm verify --repair`, then remove it",
                ) from error
        return sorted(found, key=lambda stretch: (stretch.epoch, stretch.origin, stretch.after))

    def note(self, stretches: Iterable[Stretch]) -> None:
        """Write down stretches that are not known yet; they are on disk when this returns.

        Raises:
            ConfigError: when they cannot be written.
        """
        for stretch in stretches:
            if not (self._pending(stretch).exists() or self.export_path(stretch.id).exists()):
                self.keep(stretch)

    def keep(self, stretch: Stretch) -> None:
        """Replace what is known of a stretch.

        Raises:
            ConfigError: when it cannot be written.
        """
        self._make()
        write_private(self._pending(stretch), stretch.to_json())

    def done(self, stretch: Stretch) -> None:
        """Forget a stretch that is worked off.

        Raises:
            ConfigError: when the file cannot be removed.
        """
        self._remove(self._pending(stretch))

    def forget_pending(self) -> None:
        """Forget all stretches, for this node is not in the cluster any more that they are of; exports stay.

        Raises:
            ConfigError: when a file cannot be removed.
        """
        for path in self._paths(PENDING):
            self._remove(path)

    def _pending(self, stretch: Stretch) -> Path:
        return self.path / f"{stretch.id}{PENDING}"

    # -- exports ------------------------------------------------------------------------------------------------------

    def export_path(self, name: str) -> Path:
        """Return where the export of a stretch is, or would be."""
        return self.path / f"{name}{EXPORT}"

    @contextlib.contextmanager
    def exporting(self, stretch: Stretch) -> Iterator[Draft]:
        """Yield a draft to write the export to; it takes its place at the end when it is to be kept.

        Raises:
            ConfigError: when it cannot be written.
        """
        self._make()
        path = self.export_path(stretch.id)
        temporary = path.with_name(path.name + ".new")
        try:
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                draft = Draft(file)
                yield draft
                file.flush()
                os.fsync(file.fileno())
            if draft.kept:
                temporary.replace(path)
                sync_directory(self.path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror})", hint="make room there") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def exports(self, unreadable: Callable[[PmgsyncError], None]) -> list[Export]:
        """Return the exports; `unreadable` is told of each that cannot be read."""
        found = []
        for path in self._paths(EXPORT):
            try:
                found.append(self.read(path.name.removesuffix(EXPORT)))
            except PmgsyncError as error:
                unreadable(error)
        return found

    def names(self) -> list[str]:
        """Return the ids of the exports."""
        return [path.name.removesuffix(EXPORT) for path in self._paths(EXPORT)]

    def folders(self) -> list[str]:
        """Return the ids of the directories with files of a configuration.

        Raises:
            ConfigError: when the directory cannot be read.
        """
        return [path.name for path in self._entries() if _FILES_ID.fullmatch(path.name)]

    def files_in(self, folder: str) -> list[tuple[str, int]]:
        """Return what `folders` has under an id: absolute names, as they had them, and sizes in bytes.

        Raises:
            ConfigError: when there is none of that name, or it cannot be read.
        """
        path = self._folder(folder)
        try:
            found = [each for each in sorted(path.rglob("*")) if each.is_file() and not each.is_symlink()]
            return [(f"/{each.relative_to(path)}", each.stat().st_size) for each in found]
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from error

    def _folder(self, name: str) -> Path:
        path = self.path / name
        if not _FILES_ID.fullmatch(name) or not path.is_dir():
            raise _unknown(name)
        return path

    def alerts(self) -> list[dict[str, str]]:
        """Return what status is to say of the exports, as long as somebody has not dropped them."""
        try:
            names, folders = self.names(), self.folders()
            if [*names, *folders] != self._told[0]:
                texts = [_alert(name, self.export_path(name)) for name in names]
                self._told = [*names, *folders], texts + [_files_alert(name) for name in folders]
        except PmgsyncError as error:
            return [{"kind": "divergence", "text": str(error)}]
        return self._told[1]

    def read(self, name: str) -> Export:
        """Return an export.

        Raises:
            ConfigError: when there is none of that name, or it cannot be read.
            ProtocolError: when it is damaged.
        """
        path = self.export_path(name)
        try:
            if not _ID.fullmatch(name):
                raise FileNotFoundError
            with path.open(encoding="ascii", errors="replace") as file:
                return Export(name, path, read_lines(file))
        except FileNotFoundError:
            raise _unknown(name) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from error

    def drop(self, name: str) -> None:
        """Remove an export for good.

        Raises:
            ConfigError: when there is none of that name, or it cannot be removed.
        """
        if _FILES_ID.fullmatch(name):
            path = self._folder(name)
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise ConfigError(f"{path} cannot be removed ({error.strerror})") from error
            return
        if not _ID.fullmatch(name) or not self.export_path(name).exists():
            raise _unknown(name)
        self._remove(self.export_path(name))

    # -- the directory ------------------------------------------------------------------------------------------------

    def _paths(self, suffix: str) -> list[Path]:
        return [path for path in self._entries() if path.suffix == suffix and _ID.fullmatch(path.stem)]

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror})") from error

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            sync_directory(self.path.parent)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made ({error.strerror})") from error

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be removed ({error.strerror})") from error


def _unknown(name: str) -> ConfigError:
    hint = "`pmgcm divergence list` shows what there is"
    return ConfigError(f"this node has no divergence {name!r:.80}", hint=hint)


def _files_alert(name: str) -> dict[str, str]:
    text = f"this node had files of a configuration that do not count: `pmgcm divergence show {name}`"
    return {"kind": "divergence", "text": text}


def _alert(name: str, path: Path) -> dict[str, str]:
    text = f"this node had changes that do not count: `pmgcm divergence show {name}`"
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            missing = json.loads(file.readline(MAX_LINE)).get("missing", "")
    except (OSError, ValueError, AttributeError) as error:
        missing = f"the file cannot be read ({type(error).__name__})"
    return {"kind": "divergence", "text": f"{text}; {missing}" if missing else text}
