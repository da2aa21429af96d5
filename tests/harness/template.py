"""Stopped clusters that others are copied from: servers' data and state directories, with ports of their own."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from broker.cluster.state_directory import StateDirectory
from cli.demo.embedded import EmbeddedPostgres
from pmgsync.core.members import Member
from pmgsync.core.signed import sign
from tests.harness.session import scratch_directory

if TYPE_CHECKING:
    from tests.harness.cluster import Node

_COMPLETE = "complete"


class CopiedServer(EmbeddedPostgres):
    """A server that may begin as a copy of another one. Both have one system identifier, so they never meet."""

    def adopt(self, data: Path) -> None:
        """Take a copy of a stopped server's data directory, before the first start."""
        self._ready_guard()
        _copy(data, self.data_dir)


class Template:
    """A cluster on disk. The first that asks for it makes it; all test processes of the run share it."""

    def __init__(self, name: str) -> None:
        self._directory = scratch_directory() / "templates" / name

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Keep others waiting while it is made or copied; yields whether it is there already."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield (self._directory / _COMPLETE).exists()

    def save(self, nodes: Sequence[Node]) -> None:
        """Copy stopped nodes here."""
        for node in nodes:
            place = self._directory / node.name
            place.mkdir()
            _copy(node.server.data_dir, place / "data")
            _copy(node.state_dir, place / "state")
        (self._directory / _COMPLETE).touch()

    def load(self, nodes: Sequence[Node]) -> None:
        """Make new nodes copies of those here, and have their cluster document say where they are reached."""
        for node in nodes:
            place = self._directory / node.name
            node.directory.mkdir(parents=True)
            node.server.adopt(place / "data")
            _copy(place / "state", node.state_dir)
        master = StateDirectory(nodes[0].state_dir)
        held, key = master.document(), master.keys().sign_private
        assert held is not None
        members = tuple(_moved(member, node) for member, node in zip(held.document.members, nodes, strict=True))
        signed = sign(replace(held.document, members=members), held.signer, key, after=held)
        for node in nodes:
            StateDirectory(node.state_dir).store_document(signed)


def _moved(member: Member, node: Node) -> Member:
    assert member.name == node.name
    return replace(member, address=node.address, events=node.events, control=node.control, join=node.join)


def _copy(source: Path, target: Path) -> None:
    # Owners are kept: as root the server runs as somebody else.
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)
