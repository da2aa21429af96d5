"""Nodes that lead or are to: the real voters, leases, handovers and promotions, in one process and in real time.

What lies below is played here: heartbeats, chains of which only the positions are told, agents, and the connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from broker.chains.chains import Chains
from broker.cluster.state_directory import StateDirectory
from broker.heartbeats.heartbeat import Applied, HeldChain, OwnChain
from broker.leadership.asking import Answer
from broker.leadership.leadership import Around, Leadership
from broker.leadership.voter import Voter
from broker.members.calls import Attachments, End
from broker.members.members import Members
from broker.requests.voting import VotingRequests
from pmgsync.core.chains import ChainHead
from pmgsync.core.membership import ClusterDocument, SignedDocument, sign
from pmgsync.core.positions import Position
from pmgsync.core.signed import Order, compare
from pmgsync.divergence_files import DivergenceFiles
from pmgsync.errors import PmgsyncError, UnreachableError
from pmgsync.wire.messages import Message, error_map
from tests.broker.test_voter import KEYS, document

LEASE_S = 1.0
DELAY_S = 0.005
LIFE = 7


@dataclass
class PlayedChains:
    """How far a node has each chain, as LSNs; all in one life."""

    cid: int
    journal: dict[int, int]
    first: dict[int, int]
    applied: dict[int, Applied]
    held_back: set[int] = field(default_factory=set)

    @property
    def own(self) -> Any:
        return SimpleNamespace(chain=OwnChain(LIFE, 0, False, self.journal[self.cid] + 50))

    def heads(self) -> dict[int, ChainHead]:
        return {origin: ChainHead.at(origin, LIFE, Position(lsn)) for origin, lsn in self.journal.items()}

    def held(self) -> dict[int, HeldChain]:
        return {
            origin: HeldChain(LIFE, Position(self.first.get(origin, 0)), Position(lsn))
            for origin, lsn in self.journal.items()
        }

    def hold(self, origin: int) -> None:
        self.held_back.add(origin)

    def release(self) -> None:
        self.held_back.clear()


class LeadingNode:
    """One node."""

    def __init__(self, world: LeadingNodes, directory: Path, cid: int) -> None:
        self.world, self.cid = world, cid
        self.signed = world.first
        self.voter = Voter(StateDirectory(directory / str(cid)), KEYS[cid])
        self.voter.follow(self.signed, cid)
        applied = {origin: Applied(LIFE, Position(100), Position(100)) for origin in world.cids}
        self.chains = PlayedChains(cid, dict.fromkeys(world.cids, 100), {}, applied)
        self.incomplete: list[str] = []
        self.trees: list[dict[str, Any]] = []
        self.agent_up = True
        self.open_until = 0.0
        self.leading = Leadership(
            cid,
            self.voter,
            cast(Members, self),
            cast(Chains, self.chains),
            DivergenceFiles(directory / str(cid)),
            Around(
                document=lambda: self.signed,
                change_document=self.change,
                begin_epoch=self.change,
                offer_document=self.offered,
                ask=self.ask,
                tell_agent=self.tell_agent,
                ask_agent=self.ask_agent,
                trees=lambda: self.trees,
            ),
        )
        self.voting = VotingRequests(
            self.voter,
            self.leading.handover,
            offer_document=self.offered,
            document=lambda: self.signed,
            refused=lambda *_: None,
        )

    # -- documents ----------------------------------------------------------------------------------------------------

    def change(self, changed: ClusterDocument) -> None:
        self.follow(sign(changed, self.cid, KEYS[self.cid].sign_private, after=self.signed))

    def offered(self, cid: int, data: bytes) -> None:
        signed = SignedDocument.unpack(data)
        if self.voter.may_take(signed):
            self.follow(signed)
        elif compare(signed.document, self.signed.document) is Order.NEWER:
            self.send(cid, {"op": "offer"}, (self.signed.pack(),))

    def follow(self, signed: SignedDocument) -> None:
        self.signed = signed
        self.voter.follow(signed, self.cid)
        self.leading.follow_document()

    # -- members (`broker.members.members.Members`) -------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return (self.link(member.cid) for member in self.signed.document.members if member.cid != self.cid)

    def link(self, cid: int) -> Any:
        other, member = self.world.nodes[cid], self.signed.document.member(cid)
        version = other.signed.document.version
        beat = SimpleNamespace(
            chains=other.chains.held(), own=other.chains.own.chain, epoch=version[0], serial=version[1], received=0.0
        )
        well = self.world.connected(self.cid, cid)
        return SimpleNamespace(member=member, heartbeat=beat, up=well, can_be_asked=well, age_s=0.0 if well else 99.0)

    def acked(self, cid: int) -> dict[int, Applied]:
        return self.world.nodes[cid].chains.applied

    def refuse(self, cid: int, error: PmgsyncError) -> None:
        pass

    def send(self, cid: int, message: Mapping[str, Any], attachments: Sequence[bytes] = ()) -> bool:
        return self.ask(cid, message, lambda *_: None, attachments)

    def ask(self, cid: int, message: Mapping[str, Any], answer: Answer, attachments: Sequence[bytes]) -> bool:
        if not self.world.connected(self.cid, cid):
            return False
        self.world.later(
            self.cid, cid, lambda: self.world.nodes[cid].handle(self.cid, dict(message), answer, attachments)
        )
        return True

    def handle(self, asker: int, message: Message, answer: Answer, attachments: Sequence[bytes]) -> None:
        def send(reply: Mapping[str, Any], parts: Attachments) -> bool:
            given = [part for part in parts if isinstance(part, bytes)]
            self.world.later(self.cid, asker, lambda: answer(dict(reply), given))
            return True

        try:
            assert self.voting.handle(asker, send, {"id": 1, **message}, attachments), message
        except PmgsyncError as error:
            send(error_map(1, error), ())

    # -- the agent ----------------------------------------------------------------------------------------------------

    def tell_agent(self, message: Message) -> bool:
        if self.agent_up:
            self.world.later(self.cid, self.cid, lambda: self.agent_took(message))
        return self.agent_up

    def agent_took(self, message: Message) -> None:
        self.open_until = message["until"]
        opened = message["until"] > time.monotonic()
        told = {"op": "lease.told", "number": message["number"], "guarded": True, "open": opened}
        self.leading.agent_told({**told, "reign": message["epoch"]})

    def ask_agent(self, caller: End, method: str, message: Message | None = None) -> None:
        if not self.agent_up:
            raise UnreachableError("the agent is not running")
        if method == "lease.shut":
            self.open_until = 0.0
        results: dict[str, dict[str, Any]] = {
            "lease.shut": {"closed": True},
            "barrier": {"lsn": self.chains.journal[self.cid] + 10},
            "tables.incomplete": {"tables": self.incomplete},
        }
        done = {"op": "done", "id": caller.request, "result": results[method]}
        self.world.later(self.cid, self.cid, lambda: caller.send(done, ()))

    @property
    def is_open(self) -> bool:
        return self.signed.document.master == self.cid and self.open_until > time.monotonic()


class Asked:
    """Whoever has asked for a promotion."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.result: dict[str, Any] | None = None
        self.error = ""

    def send(self, message: Mapping[str, Any], _: Attachments) -> bool:
        if message["op"] == "step":
            self.steps.append(message["step"])
        elif message["op"] == "done":
            self.result = message["result"]
        else:
            self.error = message["message"]
        return True

    @property
    def over(self) -> bool:
        return bool(self.result or self.error)


class LeadingNodes:
    """The nodes, and what is under way between them; node 1 is the master."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        self.cids = range(1, count + 1)
        signed = document(self.cids)
        made = replace(signed.document, lease_ms=round(LEASE_S * 1000), fence="lease" if count > 2 else "none")
        self.first = sign(made, 1, KEYS[1].sign_private)
        self.cut: set[frozenset[int]] = set()
        self.dead: set[int] = set()
        self.under_way: list[tuple[float, int, int, Callable[[], object]]] = []
        self.nodes: dict[int, LeadingNode] = {}
        for cid in self.cids:
            self.nodes[cid] = LeadingNode(self, directory, cid)
        for node in self.nodes.values():
            node.leading.follow_document()
        self.until(lambda: self.nodes[1].is_open)

    def connected(self, one: int, other: int) -> bool:
        return not {one, other} & self.dead and frozenset((one, other)) not in self.cut

    def later(self, source: int, target: int, what: Callable[[], object]) -> None:
        self.under_way.append((time.monotonic() + DELAY_S, source, target, what))

    def promote(self, cid: int, *, force: bool = False, agreed: bool = True) -> Asked:
        asked = Asked()
        try:
            self.nodes[cid].leading.promotion.begin(asked.send, 1, force=force, agreed=agreed)
        except PmgsyncError as error:
            asked.error = error.message
        return asked

    def until(self, condition: Callable[[], Any], within_s: float = 15.0) -> None:
        """Let time pass until something is so."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s"
            self.step()

    def pass_time(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()

    def step(self) -> None:
        now = time.monotonic()
        due = [one for one in self.under_way if one[0] <= now]
        self.under_way = [one for one in self.under_way if one[0] > now]
        for _, source, target, what in due:
            if target not in self.dead and (source == target or self.connected(source, target)):
                what()
        for cid, node in self.nodes.items():
            if cid not in self.dead:
                self.move_chains(node)
                node.leading.tick()
        self.check()
        time.sleep(0.002)

    def move_chains(self, node: LeadingNode) -> None:
        """Have a node receive and apply what others have, unless it holds a chain back."""
        chains = node.chains
        for origin in self.cids:
            if origin == node.cid:
                continue
            if origin not in chains.held_back:
                for other in self.nodes.values():
                    first = other.chains.first.get(origin, 0)
                    if self.connected(node.cid, other.cid) and first <= chains.journal[origin]:
                        chains.journal[origin] = max(chains.journal[origin], other.chains.journal[origin])
            lsn = max(chains.journal[origin], chains.applied[origin].position.lsn)
            chains.applied[origin] = Applied(LIFE, Position(lsn), Position(lsn))

    def check(self) -> None:
        """No two nodes are open at one time; the deadline stands in the database of one that is dead, too."""
        opened = [cid for cid, node in self.nodes.items() if node.is_open]
        assert len(opened) <= 1 or any(one.signed.document.forced for one in self.nodes.values()), opened

    def masters(self) -> set[tuple[int, int]]:
        """Return epoch and master of the documents of the nodes that are alive."""
        alive = [node.signed.document for cid, node in self.nodes.items() if cid not in self.dead]
        return {(one.epoch, one.master) for one in alive}
