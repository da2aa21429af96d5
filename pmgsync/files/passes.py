"""The record of a rename pass: its steps, on disk from before the first to after the last.

A process that was killed in the middle leaves some files of a configuration new and some old. The next one finishes the
pass from this record and the staging area, before it does anything else: the owner need not be reachable, and this node
may be the owner itself by then. The contents are on disk before the record is.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

from pmgsync.core.filenames import OWN_DIRECTORY, check_name
from pmgsync.core.manifests import Entry, Manifest, check_entry
from pmgsync.core.renames import Step
from pmgsync.errors import ProtocolError
from pmgsync.files.cache import Cache
from pmgsync.files.directories import Root, explain
from pmgsync.files.hashing import ChangedMeanwhileError, hash_file
from pmgsync.files.placing import Placer
from pmgsync.files.staging import Staging

log = logging.getLogger(__name__)

_RECORD = OWN_DIRECTORY + b"/pass"
_NEW_RECORD = OWN_DIRECTORY + b"/pass-new"
_VERSION = 1


class Recorded(NamedTuple):
    """One step, and what the owner says of its name: `step.entry` is what that becomes here."""

    step: Step
    owned: Entry | None


def record_pass(root: Root, steps: Sequence[Step], owned: Mapping[bytes, Entry]) -> None:
    """Write the record of a pass that is to begin; the contents that it needs are staged and on disk.

    Raises:
        FilesError: when it cannot be written.
    """
    rows = [
        [
            step.what,
            step.name,
            step.entry and list(step.entry),
            step.keep,
            (mine := owned.get(step.name)) and list(mine),
        ]
        for step in steps
    ]
    data = msgpack.packb([_VERSION, rows], use_bin_type=True)
    try:
        with root.parent(_NEW_RECORD) as (fd, new):
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
            with open(file, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(file)
            os.rename(new, _RECORD.rpartition(b"/")[2], src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)
    except OSError as error:
        raise explain(error, f"cannot write {root.show(_RECORD)}") from error


def drop_record(root: Root) -> None:
    """Remove the record: its pass is on disk.

    Raises:
        FilesError: when it cannot be removed.
    """
    try:
        with root.parent(_RECORD) as (fd, last), contextlib.suppress(FileNotFoundError):
            os.unlink(last, dir_fd=fd)
            os.fsync(fd)
    except OSError as error:
        raise explain(error, f"cannot remove {root.show(_RECORD)}") from error


def finish_pass(root: Root, cache: Cache, tree: str, keep_in: Path | None = None) -> list[str]:
    """Finish the pass that was cut off, if one was; return the paths of copies that were kept.

    Args:
        tree: its name.
        keep_in: as for `Placer`.

    Raises:
        FilesError: when the disk refuses it; it is finished at the next start then.
    """
    recorded = _read(root)
    if not recorded:
        return []
    held = cache.held(tree)
    staging = Staging(root)
    try:
        placer = Placer(root, staging, keep_in)
        steps = [left for each in recorded if (left := _left(root, staging, held, each.step)) is not None]
        placer.sync_contents(steps)
        done = set(placer.run(steps))
        placer.sync()
    finally:
        staging.close()
    cache.write(tree, "held", [(each.step.name, each.owned, None) for each in recorded if each.step.name in done])
    drop_record(root)
    log.warning("action=pass-finished tree=%s steps=%d errors=%d", tree, len(done), len(placer.errors))
    return placer.kept


def _left(root: Root, staging: Staging, held: Manifest, step: Step) -> Step | None:
    """Return what is left to be done of a step, None when nothing can be: the usual comparison sees to it then."""
    try:
        with root.parent(step.name) as (fd, last):
            here = hash_file(fd, last)[0]
    except (OSError, ChangedMeanwhileError):
        here = b""  # nothing is there, or no file
    before = held.get(step.name)
    keep = step.keep if not here else before is None or here != before.digest
    if step.what == "remove":
        return step._replace(keep=keep)
    if step.what != "put" or step.entry is None:
        return step
    if here == step.entry.digest:
        return step._replace(what="set", keep=False)
    return step._replace(keep=keep) if step.entry.digest in staging.whole else None


def _read(root: Root) -> list[Recorded]:
    try:
        file = root.open_file(_RECORD)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise explain(error, f"cannot read {root.show(_RECORD)}") from error
    with open(file, "rb") as stream:
        data = stream.read()
    try:
        version, rows = msgpack.unpackb(data)
        if version != _VERSION:
            raise ProtocolError(f"it is of version {version}")
        return [
            Recorded(
                Step(what, check_name(name), entry and check_entry(name, Entry(*entry)), keep), owned and Entry(*owned)
            )
            for what, name, entry, keep, owned in rows
        ]
    except Exception as error:  # any bytes may be there
        log.warning("action=pass-unreadable record=%s error=%s", root.show(_RECORD), error)
        drop_record(root)
        return []
