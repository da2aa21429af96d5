"""A worker's session with its broker, beside a broker that the test plays: what comes while an answer is waited for."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pmgsync.errors import UnreachableError
from pmgsync.wire.link import BrokerLink, LinkOverError
from pmgsync.wire.local import MAX_PARTS, LocalConnection
from pmgsync.wire.messages import Message, pack, unpack
from pmgsync.wire.waiting import Waiter

Serve = Callable[[Message], Iterator[tuple[Message, *tuple[bytes, ...]]]]
DOCUMENT = b"a cluster document"
LONG_S = 60.0


class Served:
    """Plays the broker on a local socket, for one session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._link: BrokerLink | None = None

    def link(self, serve: Serve) -> BrokerLink:
        """Return a session whose requests a function answers; it ends with the function, by StopIteration."""
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()
        self._link = BrokerLink(self._path, "apply:2")
        self._link.hello()
        return self._link

    def _run(self, serve: Serve) -> None:
        made, _ = self._listener.accept()
        connection = LocalConnection(made)
        try:
            while not self._over.is_set():
                try:
                    connection.receive()
                except UnreachableError:
                    return
                while connection.messages:
                    for message, *parts in serve(unpack(connection.messages.popleft()[0])):
                        if message["op"] == "end":
                            return
                        connection.send_all([pack(message), *parts], LONG_S)
                self._over.wait(0.005)
        finally:
            connection.close()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()


@pytest.fixture
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as directory:
        made = Served(Path(directory) / "broker.sock")
        yield made
        made.close()


def serve(message: Message) -> Iterator[tuple[Message, *tuple[bytes, ...]]]:
    """Answer, after a document that changes just now, and an answer that nobody waits for any more."""
    if message["op"] != "hello":
        yield {"op": "document", "id": 0}, DOCUMENT
        yield ({"op": "late", "id": message["id"] - 1},)
    yield ({"op": "done", "id": message["id"], "result": {}},)


def test_a_document_that_comes_while_an_answer_is_waited_for_is_received_next(served: Served) -> None:
    link = served.link(serve)
    assert link.request({"op": "apply.open"})[0]["op"] == "done"
    assert link.receive(0) == ({"op": "document", "id": 0}, [DOCUMENT])
    assert link.receive(0) is None
    assert [answer["op"] for answer, _ in link.call("snapshot", {})] == ["done"]
    assert [message["op"] for message, _ in link.pending()] == ["document"]


def test_what_was_read_with_an_answer_ends_the_next_wait(served: Served) -> None:
    def more(message: Message) -> Iterator[tuple[Message, *tuple[bytes, ...]]]:
        yield ({"op": "done", "id": message["id"], "result": {}},)
        yield {"op": "document", "id": 0}, DOCUMENT

    link = served.link(more)
    Waiter(link).wait(LONG_S)
    for _ in range(3):  # by whatever way it is read
        link.request({"op": "apply.open"})
    begun = time.monotonic()
    waiter = Waiter(link)
    got: list[str] = []
    while len(got) < 4:
        waiter.wait(LONG_S)
        got += [message["op"] for message, _ in link.pending()]
    assert got == ["document"] * 4
    assert time.monotonic() - begun < LONG_S / 2


def test_a_broker_that_closes_ends_whoever_waits_and_whoever_sends(served: Served) -> None:
    def leave(message: Message) -> Iterator[tuple[Message, *tuple[bytes, ...]]]:
        if message["op"] != "hello":
            yield ({"op": "last", "id": 0},)
            yield ({"op": "end"},)
        yield ({"op": "done", "id": message["id"], "result": {}},)

    link = served.link(leave)
    link.send({"op": "report"})
    received = link.receive(LONG_S)
    assert received is not None
    assert received[0]["op"] == "last", "what came before the end is received"
    with pytest.raises(LinkOverError):
        link.receive(LONG_S)
    with pytest.raises(LinkOverError):
        while True:
            link.send({"op": "report"})
    link.close()
    with pytest.raises(LinkOverError):
        link.send({"op": "report"})


def test_what_cannot_be_read_ends_the_session(served: Served) -> None:
    def too_many(message: Message) -> Iterator[tuple[Message, *tuple[bytes, ...]]]:
        yield ({"op": "done", "id": message["id"], "result": {}},)
        if message["op"] != "hello":
            yield {"op": "data", "id": 0}, *[b""] * MAX_PARTS

    link = served.link(too_many)
    with pytest.raises(LinkOverError, match="cannot be read"):
        while True:
            link.request({"op": "ping"})


def test_no_broker_is_waited_for_only_so_long(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(UnreachableError, match="no broker answers"):
        BrokerLink(tmp_path / "broker.sock", "cli").hello(0.2)
    assert 0.2 <= time.monotonic() - begun < 5
