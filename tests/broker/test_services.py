"""The gateway's services are started again after a command that stopped them, also when that was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.cluster import eventually

SYSTEMCTL = """#!/bin/sh
cd {directory}
case "$1" in
is-active) [ -e "running.$3" ] ;;
stop) rm -f "running.$2" ;;
start) touch "running.$2" ;;
esac
"""
COMMAND = """
import sys, time
from pathlib import Path
from cli.services import stopped
with stopped(["filter", "policy", "absent"], Path(sys.argv[1])):
    Path(sys.argv[1], "inside").touch()
    time.sleep(float(sys.argv[2]))
    if sys.argv[2] == "0":
        raise RuntimeError
"""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with a file for each service that runs."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL.format(directory=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in ("filter", "policy"):
        (tmp_path / f"running.{name}").touch()
    return tmp_path


def services(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.glob("running.*"))


def test_services_run_again_after_a_failure_and_after_a_kill(running: Path) -> None:
    both = [".filter", ".policy"]
    command = [sys.executable, "-c", COMMAND, str(running)]
    assert subprocess.run([*command, "0"], check=False, capture_output=True).returncode == 1
    assert services(running) == both
    (running / "inside").unlink()
    killed = subprocess.Popen([*command, "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    eventually((running / "inside").exists, what="the services are stopped")
    assert services(running) == []
    with contextlib.suppress(ProcessLookupError):
        killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert services(running) == [], "nobody was left to start them"
    assert subprocess.run([*command, "0.01"], check=False).returncode == 0
    assert services(running) == both, "the same command does"
    assert not list(running.glob("stopped-*"))
