"""What waits for a peer, counted by what the kernel has seen acknowledged: a real TCP connection that is not read."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from broker.net.backlog import MAX_BACKLOG, Backlog, duplicate
from tests.harness.cluster import eventually

BLOCK = 1 << 20


class Sender:
    """Counts what it is to send, and sends what the connection takes, as libzmq's thread does."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.reader = socket.create_connection(listener.getsockname())
            self.writer, place = listener.accept()
        self.writer.setblocking(False)
        self.reader.settimeout(10)
        self.backlog = Backlog(self.writer.fileno(), place[:2])
        self.queued = 0

    def offer(self, size: int = BLOCK) -> bool:
        """Send a message; False when it is refused."""
        taken = self.backlog.takes(1, size)
        self.queued += size if taken else 0
        self.push()
        return taken

    def push(self) -> None:
        with suppress(BlockingIOError):
            while self.queued:
                self.queued -= self.writer.send(bytes(min(self.queued, BLOCK)))

    def read(self, size: int) -> None:
        while size > 0:
            size -= len(self.reader.recv(min(size, BLOCK)))
            self.push()

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender()
    yield made
    made.close()


def test_whoever_does_not_read_is_sent_so_much_and_whoever_reads_everything(sender: Sender) -> None:
    while sender.offer():
        assert sender.queued <= MAX_BACKLOG + 2 * BLOCK
    assert sender.queued > MAX_BACKLOG - 32 * BLOCK, "what the kernels hold does not count"
    assert not sender.offer(), "nor is it sent more a moment later"
    sender.read(40 * BLOCK)
    assert eventually(sender.offer, within_s=5, what="room is found again")
    for _ in range(300):
        sender.read(BLOCK)
        eventually(sender.offer, within_s=5, what="who reads is sent without end")


def test_a_message_larger_than_all_that_may_wait_goes_alone(sender: Sender) -> None:
    assert sender.offer(2 * MAX_BACKLOG)
    taken = 0
    while sender.offer():
        taken += BLOCK
        assert taken <= MAX_BACKLOG + 32 * BLOCK
    assert taken > MAX_BACKLOG - 32 * BLOCK
    sender.read(2 * MAX_BACKLOG + taken)
    eventually(lambda: sender.offer(1), within_s=5)
    sender.backlog.unchecked = BLOCK
    assert sender.offer(1)
    assert sender.backlog.largest < BLOCK, "it is forgotten once it has arrived"


def test_a_connection_that_is_another_by_now_is_not_asked(sender: Sender) -> None:
    sender.backlog.place = ("127.0.0.1", 1)
    for _ in range(2 * MAX_BACKLOG // BLOCK):
        assert sender.backlog.takes(1, BLOCK)


def test_a_number_that_is_a_files_by_now_is_refused_and_nothing_stays_open() -> None:
    with Path(__file__).open() as file:
        before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        for _ in range(3):
            with pytest.raises(OSError, match="non-socket"):
                duplicate(file.fileno())
        assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
