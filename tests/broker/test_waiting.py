"""Waiting: ended by a socket, a descriptor or another thread, whatever comes first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from pmgsync.wire.waiting import Waiter, Wakeup

LONG_S = 60.0


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    made = Wakeup()
    yield made
    made.close()


def readable(wakeup: Wakeup) -> bool:
    return bool(zmq.select([wakeup.fileno()], [], [], 0)[0])


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


def test_sockets_and_descriptors_end_it_as_long_as_they_are_watched(wakeup: Wakeup) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    read_end, write_end = os.pipe()
    try:
        ours.bind("inproc://waiting")
        theirs.connect("inproc://waiting")
        waiter = Waiter(ours, read_end, wakeup=wakeup)
        theirs.send(b"x")
        waiter.wait(LONG_S)
        assert ours.recv(zmq.NOBLOCK) == b"x"
        os.write(write_end, b"x")
        waiter.wait(LONG_S)
        waiter.ignore(read_end)
        begun = time.monotonic()
        waiter.wait(0.05)
        assert time.monotonic() - begun >= 0.05
        waiter.watch(read_end)
        waiter.wait(LONG_S)
    finally:
        os.close(read_end)
        os.close(write_end)
        context.destroy(linger=0)
