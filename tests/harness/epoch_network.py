"""Time, and a network that loses, delays, repeats and reorders, between the members of an `epoch_world`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.harness.epoch_observer import Message, Node, Observer


class Network(Observer):
    """What is on its way, and the transcript."""

    def __init__(self) -> None:
        super().__init__()
        self.network: list[Message] = []
        self.cut: set[frozenset[int]] = set()
        self.log: list[str] = []

    def crash(self, cid: int, *, machine: bool = False) -> None:
        """End a member."""
        raise NotImplementedError

    def tell(self, what: str) -> None:
        self.log.append(f"{self.now - 1000:7.1f} s  {what}")

    def story(self) -> str:
        """Return what happened, one event a line."""
        return "\n".join(self.log)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.check()

    def send(self, node: Node, target: int, kind: str, *content: Any) -> None:
        if kind == "vote":
            self.see_vote(node.cid, content[0])
        self.network.append(Message(node.cid, target, kind, content))

    def send_all(self, node: Node, kind: str, *content: Any) -> None:
        for cid in sorted(node.document.cids - {node.cid}):
            self.send(node, cid, kind, *content)

    def deliver(self, number: int, *, keep: bool = False, crash: bool = False) -> None:
        """Hand a message over; `keep`: it will come again; `crash`: the receiver dies when its disk is written."""
        message = self.network[number]
        if not keep:
            self.network.pop(number)
        node = self.nodes.get(message.target)
        if node is None or not node.up or frozenset((message.source, message.target)) in self.cut:
            return
        handler: Callable[..., None] = getattr(self, f"_on_{message.kind}")
        outgoing = len(self.network)
        handler(node, message.source, *message.content)
        if crash:
            del self.network[outgoing:]
            self.crash(node.cid)
        self.check()

    def lose(self, number: int) -> None:
        self.network.pop(number)

    def pick(self, kind: str, source: int = 0, target: int = 0) -> None:
        """Deliver what is of this kind now, between these two when they are named; the rest stays on its way."""
        chosen = [
            message
            for message in self.network
            if message.kind == kind and source in {0, message.source} and target in {0, message.target}
        ]
        for message in chosen:
            self.deliver(next(number for number, one in enumerate(self.network) if one is message))

    def isolate(self, cid: int) -> None:
        """Cut a member off from all others, and lose what is on its way."""
        self.cut |= {frozenset((cid, other)) for other in self.nodes if other != cid}
        self.network.clear()

    def settle(self) -> None:
        """Deliver everything there is, and what comes of it."""
        while self.network:
            self.deliver(0)
