"""A node's files are for its user only: what is made is, and what is not is refused at the start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from broker.cluster.state_directory import KEYS_FILE, StateDirectory
from broker.files import refuse_open_files
from pmgsync.errors import ConfigError
from tests.harness.brokers import running_brokers


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
@pytest.mark.parametrize("where", [".", KEYS_FILE, "journal/1/deep"])
def test_what_others_can_get_at_is_named_with_the_remedy(tmp_path: Path, where: str, mode: int) -> None:
    state = StateDirectory(tmp_path / "state")
    state.keys()
    deep = state.path / "journal" / "1" / "deep"
    deep.parent.mkdir(mode=0o700, parents=True)
    deep.parent.parent.chmod(0o700)
    deep.touch(mode=0o600)
    refuse_open_files(state.path)
    path = state.path / where
    path.chmod(mode | 0o700 if path.is_dir() else mode)
    with pytest.raises(ConfigError) as refused:
        refuse_open_files(state.path)
    assert str(path) in refused.value.message
    assert f"chmod -R go= {state.path}" in refused.value.hint
    if where == KEYS_FILE:
        with pytest.raises(ConfigError, match="other users can get at"):
            state.keys()


def test_a_broker_makes_nothing_for_others_and_does_not_start_with_what_is(tmp_path: Path) -> None:
    with running_brokers(tmp_path, 1) as (node,):
        state = node.state_dir
        assert [path for path in state.rglob("*") if path.stat().st_mode & 0o077] == []
        assert state.stat().st_mode & 0o077 == 0
    (state / KEYS_FILE).chmod(0o644)
    path = node.config
    done = subprocess.run(
        [sys.executable, "-m", "broker.main", "--config", path], check=False, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert f"other users can get at {state / KEYS_FILE}" in done.stderr
    assert "Traceback" not in done.stderr
