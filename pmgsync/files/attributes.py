"""Mode, owner and time: what an entry's become on this node, and giving them to an open file or directory."""

from __future__ import annotations

import os
import stat

from pmgsync.core.manifests import Entry
from pmgsync.files.owners import group_id, group_name, may_give_away, user_id, user_name


def localised(entry: Entry, *, trusted: bool) -> Entry:
    """Return what an entry of the owner's becomes on this node.

    Args:
        trusted: the owner is the master, whose word counts here anyway. From others no file becomes executable or runs
            with its owner's rights.
    """
    mode = entry.mode if trusted else entry.mode & (0o777 if entry.kind == "d" else 0o666)
    user, group = entry.user, entry.group
    if not may_give_away():
        user, group = user_name(os.geteuid()), group_name(os.getegid())
    else:
        if user_id(user) is None:
            user = user_name(os.geteuid())
        if group_id(group) is None:
            group = group_name(os.getegid())
    if (mode, user, group) == (entry.mode, entry.user, entry.group):
        return entry
    return entry._replace(mode=mode, user=user, group=group)


def describe(fd: int, entry: Entry) -> None:
    """Give an open file or directory its owner, mode and time; the owner first, for that clears bits of the mode."""
    # Looking costs less than setting again what is so already: most new files belong to who makes them.
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    if may_give_away():
        uid, gid = user_id(entry.user), group_id(entry.group)
        if uid not in {None, status.st_uid} or gid not in {None, status.st_gid}:
            os.fchown(fd, -1 if uid is None else uid, -1 if gid is None else gid)
            mode = -1
    if mode != entry.mode:
        os.fchmod(fd, entry.mode)
    if entry.kind == "f":
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
