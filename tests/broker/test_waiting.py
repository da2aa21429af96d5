"""Waiting: ended by a socket, a descriptor or another thread, whatever comes first."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from pmgsync.wire.waiting import Waiter, Wakeup

LONG_S = 60.0


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    made = Wakeup()
    yield made
    made.close()


def readable(wakeup: Wakeup) -> bool:
    return bool(select.select([wakeup.fileno()], [], [], 0)[0])


def test_another_thread_ends_it(wakeup: Wakeup) -> None:
    thread = threading.Timer(0.05, wakeup.wake)
    thread.start()
    Waiter(wakeup=wakeup).wait(LONG_S)
    thread.join()
    assert not readable(wakeup)
    wakeup.clear()  # nothing to take away is no error


def test_calls_before_the_wait_end_it_once(wakeup: Wakeup) -> None:
    for _ in range(3):
        wakeup.wake()
    Waiter(wakeup=wakeup).wait(LONG_S)
    assert not readable(wakeup)


def test_descriptors_end_it_as_long_as_they_are_watched(wakeup: Wakeup) -> None:
    other, other_write = os.pipe()
    read_end, write_end = os.pipe()
    try:
        waiter = Waiter(other, read_end, wakeup=wakeup)
        os.write(other_write, b"x")
        waiter.wait(LONG_S)
        assert os.read(other, 1) == b"x"
        os.write(write_end, b"x")
        waiter.wait(LONG_S)
        waiter.ignore(read_end)
        begun = time.monotonic()
        waiter.wait(0.05)
        assert time.monotonic() - begun >= 0.05
        waiter.watch(read_end)
        waiter.wait(LONG_S)
    finally:
        for end in (other, other_write, read_end, write_end):
            os.close(end)
