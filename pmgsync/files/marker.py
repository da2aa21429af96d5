"""The marker of a tree: a file at its root that proves that the right disk is mounted there.

What cannot be read is not taken to be gone. A tree whose marker is gone, or that lost all its files at once, stops
until somebody says `pmgcm files --accept`. That holds on both sides: the receiver does not empty its copy for an owner
whose disk was not mounted.
"""

from __future__ import annotations

import os
from pathlib import Path

from pmgsync.core.filenames import OWN_DIRECTORY
from pmgsync.core.trees import Tree
from pmgsync.files.cache import Cache
from pmgsync.files.directories import Root, RootMissingError, TreeStoppedError, explain, own_directory

_MARKER = b"marker"
ACCEPT_HINT = "mount it; when it is as it should be, say so: pmgcm files --accept {name}"


def open_root(tree: Tree, path: Path, cache: Cache, *, create: bool) -> Root:
    """Open the directory of a tree; `create`: make it when this node never had it.

    Raises:
        TreeStoppedError: when it is gone.
        RootMissingError: when it is not there, and is not to be made.
        FilesError: when it cannot be opened.
    """
    known = bool(cache.fact(tree.name, "marked"))
    try:
        return Root(path, tree.below, create=create and not known)
    except RootMissingError as error:
        if known:
            raise TreeStoppedError(
                f"the directory {path} is gone; nothing is done", hint=ACCEPT_HINT.format(name=tree.name)
            ) from error
        raise


def check_marker(root: Root, cache: Cache, tree: str) -> None:
    """Make the marker of a tree that never had one, else check that it is there.

    Raises:
        TreeStoppedError: when this node has known the tree before and its marker is gone.
        FilesError: when it cannot be read or written.
    """
    name = OWN_DIRECTORY + b"/" + _MARKER
    try:
        if root.lstat(name) is not None and not root.moved():
            if not cache.fact(tree, "marked"):
                cache.note(tree, "marked", "yes")
            return
    except OSError as error:
        raise explain(error, f"cannot read {root.show(name)}") from error
    if cache.fact(tree, "marked"):
        raise TreeStoppedError(
            f"the marker {root.show(name)} is gone, as if the disk were not mounted; nothing is done there",
            hint=ACCEPT_HINT.format(name=tree),
        )
    write_marker(root, cache, tree)


def write_marker(root: Root, cache: Cache, tree: str) -> None:
    """Make the marker of a tree.

    Raises:
        FilesError: when it cannot be written.
    """
    own_directory(root)
    name = OWN_DIRECTORY + b"/" + _MARKER
    try:
        with root.parent(name) as (fd, last):
            os.close(os.open(last, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd))
            os.fsync(fd)
    except OSError as error:
        raise explain(error, f"cannot make {root.show(name)}") from error
    cache.note(tree, "marked", "yes")
