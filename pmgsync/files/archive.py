"""A configuration tree for a backup: read entry by entry, and put back in one pass of renames after all is on disk.

It knows no format: who makes the backup chooses one that keeps names as bytes. What comes from a backup is trusted no
more than what comes from the network: a name cannot leave the tree, and no link is followed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pmgsync.core.filenames import Selection, check_name, show
from pmgsync.core.manifests import Entry, Manifest, check_entry
from pmgsync.core.profile import FileTree
from pmgsync.core.renames import check_shape, plan_pass
from pmgsync.errors import ProtocolError
from pmgsync.files.attributes import localised
from pmgsync.files.directories import FilesError, Root, RootMissingError, explain
from pmgsync.files.hashing import READ_BYTES, identity, new_hash
from pmgsync.files.placing import Placer
from pmgsync.files.scan import Limits, Scanner, file_entry
from pmgsync.files.staging import Staging

IN_MEMORY_BYTES = 1 << 20
"""The copy of a larger file is on disk while it is archived."""
TRIES = 5
"""A file that is written while it is read is read again, so often at most."""


@dataclass(frozen=True, slots=True)
class Archived:
    """One entry of a tree.

    Attributes:
        name: bytes, parts separated by "/", relative to the tree's root.
        entry: kind, mode, owner, size, time and digest.
        content: of a file, `entry.size` bytes from where it stands; good until the next entry is asked for.
    """

    name: bytes
    entry: Entry
    content: BinaryIO | None = None


@dataclass(slots=True)
class Restored:
    """What became of a tree.

    Attributes:
        changed: names that are written or removed now and were not as they are in the backup.
        kept: paths of copies of what was there before.
        left_out: a sentence for each entry of the backup that the profile does not select.
    """

    changed: list[bytes] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def archive_tree(rule: FileTree, path: Path, findings: dict[bytes, str] | None = None) -> Iterator[Archived]:
    """Yield what the profile selects of a tree, directories before what is in them; nothing when there is no root.

    Each file's content belongs to its entry, also when it is written meanwhile. The whole is not one instant.

    Args:
        path: the root on this node.
        findings: takes a sentence for each name that is left out: links, devices, what cannot be read.

    Raises:
        FilesError: when the tree, or a file of it, cannot be read.
    """
    try:
        root = Root(path, create=False)
    except RootMissingError:
        return
    try:
        scanner = Scanner(root, Selection(rule.include, rule.exclude), Limits(rule.max_size, rule.max_files))
        scanner.scan(settling=False)
        for name in sorted({*scanner.found.manifest, *scanner.found.unsettled}):
            entry = scanner.found.manifest.get(name)
            if entry is not None and entry.kind == "d":
                yield Archived(name, entry)
                continue
            with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as copy:
                try:
                    entry = _copy(root, name, copy)  # type: ignore[arg-type]
                except FileNotFoundError:
                    continue  # it was removed meanwhile
                except OSError as error:
                    raise explain(error, f"cannot read {root.show(name)}") from error
                copy.seek(0)
                yield Archived(name, entry, copy)  # type: ignore[arg-type]
        if findings is not None:
            findings.update(scanner.found.findings)
    finally:
        root.close()


def restore_tree(
    rule: FileTree, path: Path, items: Iterable[Archived], *, keep_in: Path, exact: bool = False
) -> Restored:
    """Make a tree hold what a backup has of it; nothing of it changes before all contents are here and on disk.

    Args:
        path: the root on this node, made when it is not there.
        items: in any order; a digest that is not b"" is proved. Users and groups that are unknown here become this
            process's own.
        keep_in: takes what is replaced or removed; a directory of its own for each run, made when it is needed.
        exact: remove what the profile selects and the backup does not have.

    Raises:
        ProtocolError: when the backup has names or entries that cannot be a tree's.
        FilesError: when something cannot be read or written; the tree is as it was, unless the error names files.
    """
    result = Restored()
    selection = Selection(rule.include, rule.exclude)
    root = Root(path)
    try:
        staging = Staging(root, b"restore")
        try:
            wanted = _take_in(root, staging, selection, items, result)
            check_shape(wanted, wanted.items())
            scanner = Scanner(root, selection, Limits(rule.max_size, rule.max_files))
            scanner.scan(settling=False)
            actual = scanner.found.manifest
            steps = plan_pass(wanted.entries, actual.entries, {}, {*wanted, *(actual if exact else ())})
            placer = Placer(root, staging, keep_in)
            placer.sync_contents(steps)
            result.changed = placer.run(steps)
            placer.sync()
            result.kept = placer.kept
            staging.keep_only(set())
        finally:
            staging.close()
    finally:
        root.close()
    if placer.errors:
        first, *others = placer.errors.values()
        more = f", and {len(others)} more" if others else ""
        raise FilesError(f"{first.message}{more}; the rest of the backup is in place", hint=first.hint)
    return result


def _take_in(
    root: Root, staging: Staging, selection: Selection, items: Iterable[Archived], result: Restored
) -> Manifest:
    """Stage all contents, and return what the tree is to hold."""
    wanted = Manifest()
    for item in items:
        name, entry = check_name(item.name), item.entry
        if not selection.selects(name):
            result.left_out.append(f"{show(name)} is left out: the profile does not have it synchronised")
            continue
        if item.content is not None:
            try:
                digest, size = staging.take(iter(partial(item.content.read, READ_BYTES), b""), entry.digest)
            except OSError as error:
                raise explain(error, f"cannot write {root.show(name)}") from error
            if size != entry.size:
                raise ProtocolError(f"{show(name)} has {size} bytes in the backup, {entry.size} are announced")
            entry = entry._replace(digest=digest)
        wanted.set(name, localised(check_entry(name, entry), trusted=True))
    return wanted


def _copy(root: Root, name: bytes, copy: BinaryIO) -> Entry:
    """Copy a file, and return the entry that belongs to what was copied."""
    for _ in range(TRIES):
        copy.seek(0)
        copy.truncate()
        state = new_hash()
        fd = root.open_file(name)
        try:
            before = os.fstat(fd)
            while data := os.read(fd, READ_BYTES):
                state.update(data)
                copy.write(data)
            if identity(os.fstat(fd)) == identity(before):
                return file_entry(before, state.digest())
        finally:
            os.close(fd)
    raise FilesError(f"{root.show(name)} is written all the time", hint="try again when it is not")
