"""A worker's session with its broker, beside a broker that the test plays: what comes while an answer is waited for."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from pmgsync.wire.link import BrokerLink
from pmgsync.wire.messages import Message, pack, unpack

Serve = Callable[[Message], Iterator[tuple[Message, *tuple[bytes, ...]]]]
DOCUMENT = b"a cluster document"


@pytest.fixture
def served() -> Iterator[Callable[[Serve], BrokerLink]]:
    """Return a session whose requests a function answers."""
    with tempfile.TemporaryDirectory() as directory, zmq.Context() as context:
        path = Path(directory) / "broker.sock"
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        router.bind(f"ipc://{path}")
        links: list[BrokerLink] = []
        over = threading.Event()

        def run(serve: Serve) -> None:
            while not over.is_set():
                if router.poll(20):
                    identity, request, *_ = router.recv_multipart()
                    for message, *parts in serve(unpack(request)):
                        router.send_multipart([identity, pack(message), *parts])

        def make(serve: Serve) -> BrokerLink:
            threads.append(threading.Thread(target=run, args=(serve,)))
            threads[0].start()
            links.append(BrokerLink(path, "apply:2"))
            links[0].hello()
            return links[0]

        threads: list[threading.Thread] = []
        yield make
        for link in links:
            link.close()
        over.set()
        for thread in threads:
            thread.join()
        router.close()


def serve(message: Message) -> Iterator[tuple[Message, *tuple[bytes, ...]]]:
    """Answer, after a document that changes just now, and an answer that nobody waits for any more."""
    if message["op"] != "hello":
        yield {"op": "document", "id": 0}, DOCUMENT
        yield ({"op": "late", "id": message["id"] - 1},)
    yield ({"op": "done", "id": message["id"], "result": {}},)


def test_a_document_that_comes_while_an_answer_is_waited_for_is_received_next(
    served: Callable[[Serve], BrokerLink],
) -> None:
    link = served(serve)
    assert link.request({"op": "apply.open"})[0]["op"] == "done"
    assert link.receive(0) == ({"op": "document", "id": 0}, [DOCUMENT])
    assert link.receive(0) is None
    assert [answer["op"] for answer, _ in link.call("snapshot", {})] == ["done"]
    assert [message["op"] for message, _ in link.pending()] == ["document"]
