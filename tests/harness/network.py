"""A network of namespaces: each node has a link of its own to one bridge, and a link can be taken down."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

_numbers = itertools.count(1)


class Network:
    """Namespaces with the addresses 10.213.7.1, 10.213.7.2, …

    Attributes:
        names: of the namespaces, in the order of the nodes.
    """

    def __init__(self, hub: str, names: tuple[str, ...]) -> None:
        self.names = names
        self._hub = hub

    def cut(self, number: int) -> None:
        """Take the link of a node down; the first node is 1. Connections stay open and hear nothing."""
        self._set(number, "down")

    def heal(self, number: int) -> None:
        """Bring the link up again."""
        self._set(number, "up")

    def _set(self, number: int, state: str) -> None:
        subprocess.run(["ip", "-n", self._hub, "link", "set", f"port{number}", state], check=True)


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make a network for nodes; a test is skipped where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and iproute2")
    prefix = f"pmgsync{os.getpid()}x{next(_numbers)}"
    hub, names = f"{prefix}hub", tuple(f"{prefix}n{number}" for number in range(1, count + 1))
    made: list[str] = []
    try:
        for name in (hub, *names):
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        bridge = ["ip", "-n", hub, "link", "add", "bridge0", "type", "bridge"]
        if subprocess.run(bridge, check=False, capture_output=True).returncode:
            pytest.skip("bridges between network namespaces cannot be made here")
        _ip(hub, "link", "set", "bridge0", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            link = ["ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub]
            subprocess.run(link, check=True)
            _ip(hub, "link", "set", port, "master", "bridge0", "up")
            _ip(name, "addr", "add", f"10.213.7.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip(name, "link", "set", device, "up")
        yield Network(hub, names)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(namespace: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", namespace, *arguments], check=True)
