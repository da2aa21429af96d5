"""Checks of this node beside its database: ports, state directory, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.console import amount
from cli.port_checks import port_findings
from pmgsync.core.findings import Finding, judged

if TYPE_CHECKING:
    from pathlib import Path

    from pmgsync.config import NodeConfig

LEAST_FREE_BYTES = 1 << 30


def check_node(config: NodeConfig, *, running: bool) -> Iterator[Finding]:
    """Yield what is found.

    Args:
        running: True when the broker runs here: it is what holds the ports then.
    """
    yield from (not running and port_findings(config)) or [Finding("ports", True)]
    directory = config.state_dir
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    yield judged(
        "state directory", os.access(directory, os.W_OK | os.X_OK),
        f"{directory} cannot be written to by this user",
        "run pmgcm as the user of the services, or give that user the directory",
    )  # fmt: skip
    yield _check_disk(directory, config.journal.max_bytes)


def _check_disk(directory: Path, limit: int) -> Finding:
    free = shutil.disk_usage(directory).free
    if free < LEAST_FREE_BYTES:
        text = f"{amount(free)} are free for the journal in {directory}"
        return Finding("disk", False, text, "make room: capture stops when the journal cannot be written")
    if free < limit:
        text = f"{amount(free)} are free in {directory}, each chain's journal may grow to {amount(limit)}"
        return Finding("disk", True, text, "make room, or set [journal] max_size in node.toml")
    return Finding("disk", True)
