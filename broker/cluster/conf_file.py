"""Writes `cluster.conf`, in which the gateway's own daemons read who is in the cluster, as the document says it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pmgsync.config import NodeConfig
from pmgsync.core.cluster_conf import ConfMember, parse, render, with_members
from pmgsync.core.membership import ClusterDocument
from pmgsync.errors import ConfigError, PmgsyncError
from pmgsync.gateway import cluster_conf_path
from pmgsync.private_files import sync_directory
from pmgsync.profile_file import load_profile

log = logging.getLogger(__name__)

NEW_MODE = 0o644
"""Mode of a new file: daemons of other users read it, and nothing in it is secret."""
MAX_BYTES = 1 << 20


class ConfFile:
    """Keeps the file in line with the document. A failure is shown, and the write is tried again.

    Attributes:
        problem: why the file is not as it should be, "" when it is.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._document: ClusterDocument | None = None
        self.problem = ""

    def follow(self, document: ClusterDocument) -> None:
        """Bring the file in line with a document."""
        self._document = document
        try:
            if write_cluster_conf(document, self._config):
                log.info("action=cluster-conf epoch=%d serial=%d", *document.version)
            self.problem = ""
        except PmgsyncError as error:
            if str(error) != self.problem:
                log.error("action=cluster-conf error=%s", error)
            self.problem = str(error)

    def retry(self) -> None:
        """Try again what has failed."""
        if self.problem and self._document is not None:
            self.follow(self._document)


def write_cluster_conf(document: ClusterDocument | None, config: NodeConfig) -> bool:
    """Bring the file in line with the document, atomically; mode and owner of the old one are kept.

    Args:
        document: None when this node is in no cluster (any more): the members go from the file.

    Returns:
        True when it was written, False when it was as it should be, or there is no gateway here.

    Raises:
        ConfigError: when it cannot be read or written; the old one stays.
    """
    path = cluster_conf_path(config, load_profile(config.profile))
    if path is None:
        return False
    try:
        before = _read(path)
        members = _members(document) if document is not None else ()
        text = render(with_members(parse(before), members, document.max_cid if document is not None else 0))
        if text == before:
            return False
        _replace(path, text)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})",
            hint="see that this user may write it, and make room there; [files] cluster_conf in node.toml names it",
        ) from error
    return True


def _members(document: ClusterDocument) -> Iterable[ConfMember]:
    return [
        ConfMember(member.cid, member.name, member.address, member.cid == document.master, dict(member.host_keys))
        for member in document.members
        if member.role != "witness"  # the gateway's daemons have nothing to do with it
    ]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ""
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, it is not a cluster.conf")
    # Lines that are not ours may hold any bytes, and stay.
    return data.decode("utf-8", "surrogateescape")


def _replace(path: Path, text: str) -> None:
    # A link is followed: the file that it leads to is the one that others read.
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            _take_after(path, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _take_after(path: Path, descriptor: int) -> None:
    """Give the new file the old one's owner and mode."""
    try:
        old = path.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, NEW_MODE)
        return
    new = os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(descriptor, old.st_uid, old.st_gid)
    os.fchmod(descriptor, old.st_mode & 0o7777)
