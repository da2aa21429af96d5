"""The state directory is this user's alone: what other users can get at is refused. And how many files may be open."""

from __future__ import annotations

import logging
import resource
import stat
from contextlib import suppress
from pathlib import Path

from pmgsync.errors import ConfigError

log = logging.getLogger(__name__)

FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO
PRIVATE_UMASK = 0o077
"""Whatever a process of the node makes is for its user only."""


def refuse_open_files(directory: Path) -> None:
    """Refuse a state directory that other users can get into, or a file in it that they can read or write.

    What is in it are the node's keys, and a journal of everything that is written to the database.

    Raises:
        ConfigError: names all of it, and the command that puts it right.
    """
    if not directory.exists():
        return
    try:
        found = [path for path in (directory, *directory.rglob("*")) if is_open(path)]
    except OSError as error:
        raise ConfigError(
            f"the state directory {directory} cannot be looked through ({error.strerror})",
            hint="run it as the user who owns the directory",
        ) from error
    if found:
        shown = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ConfigError(
            f"other users can get at {shown}",
            hint=f"to close it: chmod -R go= {directory}; when somebody may have read its keys, delete the node, "
            "remove the directory, and join again",
        )


def is_open(path: Path) -> bool:
    """Return True when other users may do something with a file or directory."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False  # the journal's files come and go
    return not stat.S_ISLNK(mode) and bool(mode & FOR_OTHERS)


ENOUGH_DESCRIPTORS = 4096
"""For 64 members, their chains, and as many connections of strangers as `broker.net.incoming` lets stand."""


def raise_descriptor_limit() -> None:
    """Raise the limit of file descriptors to what the system allows: each connection is one, a stranger's too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
        with suppress(ValueError, OSError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < ENOUGH_DESCRIPTORS:
        log.warning(
            "action=few-descriptors limit=%d hint=give the broker at least %d open files", limit, ENOUGH_DESCRIPTORS
        )
