"""Looks for secrets of a run where everybody, or every reader of logs, could see them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from zmq.utils import z85

from broker.cluster.state_directory import StateDirectory
from tests.harness.cluster import Node

SHORT_S = 1.0
"""A command hides what it was given as soon as it runs; until then it is in the list of processes."""
SAMPLE_S = 0.02


def secret_keys(node: Node) -> set[bytes]:
    """Return the secret halves of all keys that a node holds, in the forms in which they could be written."""
    keys = StateDirectory(node.state_dir).keys()
    found: set[bytes] = set()
    for pair in (keys.current, *keys.others):
        signing = pair.sign_private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        for raw in (pair.curve_secret, signing):
            found |= {
                raw,
                raw.hex().encode(),
                raw.hex().upper().encode(),
                raw.hex(":").upper().encode(),
                z85.encode(raw),
            }
    return found


class ProcessList:
    """Notes what the list of processes shows, and for how long; `with` looks all the time."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, bytes], tuple[float, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProcessList:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            now = time.monotonic()
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = path.read_bytes()
                    begun, _ = self._seen.get((int(path.parent.name), line), (now, now))
                    self._seen[int(path.parent.name), line] = begun, now

    def shown(self, secrets: Iterable[bytes], *, within: Path) -> list[bytes]:
        """Return the command lines that name a directory and had one of these words for long."""
        words = list(secrets)
        return [
            line
            for (_, line), (begun, ended) in self._seen.items()
            if ended - begun > SHORT_S and bytes(within) in line and any(word in line for word in words)
        ]


def written(node: Node, secrets: Iterable[bytes]) -> Iterator[str]:
    """Yield the names of a node's logs that have one of these words, and of files that others could read."""
    words = list(secrets)
    for path in node.directory.glob("*.log"):
        data = path.read_bytes()
        if any(word in data for word in words):
            yield str(path)
    for path in node.state_dir.rglob("*"):
        if path.stat().st_mode & 0o077:
            yield f"{path} is open to others"
