"""A node of which only the command line runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Node:
    """A node's configuration on disk, without a database or services."""

    directory: Path
    config: Path
    ports: list[int]

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def pmgcm(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run pmgcm for this node."""
        return pmgcm("--config", str(self.config), *arguments, **environment)


def pmgcm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pmgcm, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def refused(done: subprocess.CompletedProcess[str], *expected: str, code: int = 1) -> None:
    """Check that a command failed with a sentence that has these parts, and no traceback."""
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
