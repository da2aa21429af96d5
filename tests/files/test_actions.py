"""Actions: real commands, run once for a batch, when files and rows are in place, within a time, and again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pmgsync.agent import actions as module
from pmgsync.agent.actions import Actions
from pmgsync.core.profile import Action
from pmgsync.files.cache import Cache
from pmgsync.profile_file import load_profile
from tests.harness.cluster import eventually

Make = Callable[..., Actions]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    opened = Cache(tmp_path / "files.db")
    yield opened
    opened.close()


@pytest.fixture
def make(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make actions for one command, which changes of the file /etc/x ask for."""
    monkeypatch.setattr(module, "TOGETHER_S", 0.1)
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.05)

    def made(
        script: str,
        *,
        applied: Callable[[int, int], bool] = lambda origin, lsn: True,
        settled: Callable[[], bool] = lambda: True,
    ) -> Actions:
        profile = replace(load_profile("mirror"), actions=(Action(("sh", "-c", script), files=("/etc/x",)),))
        return Actions(profile, cache, applied=applied, settled=settled, changed=lambda: None)

    return made


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_once_for_a_batch_when_rows_and_files_are_in_place(make: Make, cache: Cache, tmp_path: Path) -> None:
    runs, reached, behind = tmp_path / "runs", [0], [1]
    actions = make(f"echo >> {runs}", applied=lambda _, lsn: reached[0] >= lsn, settled=lambda: not behind)
    for lsn in (10, 30, 20):
        actions.request(actions.expect([b"/etc/x", b"/etc/y"]), origin=1, lsn=lsn)
    time.sleep(0.3)
    reached[0] = 29
    behind.clear()
    time.sleep(0.3)
    assert not lines(runs)
    reached[0] = 30
    eventually(lambda: lines(runs) == 1)
    eventually(lambda: not cache.facts("actions"))
    time.sleep(0.3)
    assert lines(runs) == 1
    assert actions.expect([b"/etc/y"]) == []


def test_rows_that_do_not_come_are_not_waited_for_longer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_S", 0.4)
    actions = make(f"echo >> {tmp_path}/runs", applied=lambda _, lsn: False)
    actions.request(actions.expect([b"/etc/x"]), origin=1, lsn=10)
    eventually(lambda: lines(tmp_path / "runs") == 1)


def test_one_that_fails_is_told_and_run_again(make: Make, cache: Cache, tmp_path: Path) -> None:
    right = tmp_path / "right"
    actions = make(f"echo >> {tmp_path}/runs; echo not yet; test -e {right}")
    actions.request(actions.expect([b"/etc/x"]))
    told = eventually(actions.alerts)
    assert "exit code 1, not yet; tried again in" in told[0]
    assert actions.outcomes()[0]["error"] == "exit code 1, not yet"
    right.touch()
    eventually(lambda: not actions.alerts())
    eventually(lambda: not cache.facts("actions"))
    assert [outcome["error"] for outcome in actions.outcomes()] == [""]
    # One that goes on failing is given up, and the next batch tries it anew.
    right.unlink()
    before = lines(tmp_path / "runs")
    actions.request(actions.expect([b"/etc/x"]))
    eventually(lambda: [text for text in actions.alerts() if "it is not tried again" in text])
    assert lines(tmp_path / "runs") == before + module.TRIES
    right.touch()
    actions.request(actions.expect([b"/etc/x"]))
    eventually(lambda: not actions.alerts())


def test_one_that_hangs_is_killed_with_what_it_has_started(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIME_LIMIT_S", 0.5)
    monkeypatch.setattr(module, "TRIES", 1)
    actions = make(f"sleep 1000 & echo $! > {tmp_path}/started; wait")
    actions.request(actions.expect([b"/etc/x"]))
    told = eventually(actions.alerts)
    assert "took longer than 0 s and was killed; it is not tried again" in told[0]
    started = int((tmp_path / "started").read_text())
    eventually(lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE)


def test_a_service_that_it_starts_may_go_on(make: Make, cache: Cache, tmp_path: Path) -> None:
    actions = make(f"sleep 1000 & echo $! > {tmp_path}/started")
    actions.request(actions.expect([b"/etc/x"]))
    eventually(lambda: not cache.facts("actions") and (tmp_path / "started").exists())
    os.kill(int((tmp_path / "started").read_text()), 9)
    assert not actions.alerts()


def test_what_was_owed_at_a_crash_is_run(make: Make, cache: Cache, tmp_path: Path) -> None:
    script = f"echo >> {tmp_path}/runs"
    make(script).expect([b"/etc/x"])
    make(script)
    eventually(lambda: lines(tmp_path / "runs") == 1)
    eventually(lambda: not cache.facts("actions"))
