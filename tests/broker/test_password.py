"""The root password over PAM: a service made for the test, real processes, and a loop that goes on meanwhile."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil
import pytest

from broker.cluster.password import MAX_OPEN, PamPassword
from broker.net.loop import Loop
from pmgsync.errors import MembershipError, TooManyAttemptsError
from tests.harness.pam import PAM, SECRET, Make

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not PAM.is_dir(), reason="a PAM service can be made by root only, on a machine with PAM"
)


def checking() -> list[psutil.Process]:
    """Return the processes that check passwords; other tests' servers are children of this process, too."""
    return [child for child in psutil.Process().children() if "broker.cluster.password_process" in child.cmdline()]


def ask(service: str, *passwords: str, within_s: float = 30.0) -> tuple[list[bool], int]:
    """Return the outcomes, and how often a timer of the loop ran meanwhile."""
    loop, outcomes, ticks = Loop(), list[bool](), list[float]()
    check = PamPassword(loop, service)
    begun = time.monotonic()

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(outcomes) == len(passwords) or time.monotonic() - begun > within_s:
            loop.stop()

    loop.every(0.02, tick)
    for password in passwords:
        check.start(password, outcomes.append)
    loop.run()
    check.close()
    assert not checking(), "no process is left"
    return outcomes, len(ticks)


def test_the_right_password_and_wrong_ones(make_service: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service = make_service(":")
    assert ask(service, SECRET)[0] == [True]
    for wrong in (SECRET + " ", "x", "ä" * 500):
        assert ask(service, wrong)[0] == [False]
        assert wrong not in caplog.text
    assert f"service={service}" in caplog.text
    assert SECRET not in caplog.text


def test_a_service_that_is_not_there_lets_nobody_in() -> None:
    assert ask("pmgsync-not-there", SECRET)[0] == [False]


def test_the_loop_goes_on_while_a_module_takes_its_time(make_service: Make) -> None:
    outcomes, ticks = ask(make_service("sleep 1"), SECRET)
    assert outcomes == [True]
    assert ticks > 10


def test_a_password_is_in_no_argument_list(make_service: Make, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    listing = f'for each in /proc/[0-9]*; do cat "$each/cmdline" "$each/environ"; done > {seen} 2>/dev/null'
    assert ask(make_service(listing), SECRET)[0] == [True]
    assert b"password_process" in seen.read_bytes()
    assert SECRET.encode() not in seen.read_bytes()


def test_checks_are_few_at_a_time_and_end_with_the_broker(make_service: Make) -> None:
    check = PamPassword(Loop(), make_service("sleep 60"))
    for _ in range(MAX_OPEN):
        check.start(SECRET, lambda good: None)
    assert len(checking()) == MAX_OPEN
    with pytest.raises(TooManyAttemptsError):
        check.start(SECRET, lambda good: None)
    check.close()
    assert not checking()


def test_what_cannot_be_a_password() -> None:
    check = PamPassword(Loop(), "login")
    for password in ("", "a\0b", "x" * 1025):
        with pytest.raises(MembershipError, match="a password has"):
            check.start(password, lambda good: None)
    with pytest.raises(MembershipError, match="takes no password"):
        PamPassword(Loop(), "").start("x", lambda good: None)
