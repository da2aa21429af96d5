"""A chain that is held takes nothing more, however it comes, and goes on without a hole when it is released."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from broker.chains.chains import Chains
from broker.chains.follower import Follower, Listener
from broker.heartbeats.heartbeat import HeldChain, OwnChain
from broker.members.members import Members
from broker.net.loop import Loop
from pmgsync.core.frames import Frame
from pmgsync.core.positions import Position
from tests.harness.journals import INCARNATION, OTHER, OWN, START, chain, opened, read_all


class Others:
    """Members that hold the whole chain; what they are asked is noted."""

    def __init__(self, head: Position) -> None:
        self.head = head
        self.watermark = 0
        self.asked: list[Mapping[str, Any]] = []

    def holding(self, origin: int, incarnation: int) -> dict[int, HeldChain]:
        return {origin: HeldChain(incarnation, START, self.head)}

    def send(self, cid: int, message: Mapping[str, Any]) -> bool:
        self.asked.append(message)
        return True

    def own_chain(self, cid: int) -> OwnChain:
        return OwnChain(INCARNATION, 0, False, self.watermark)

    def up(self, cid: int) -> bool:
        return True


class Taken:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def taken(self, frame: Frame) -> None:
        self.frames.append(frame)


def test_a_journal_that_began_with_a_copy_knows_what_it_lacks(tmp_path: Path) -> None:
    """The copy was taken at 115, after the frames that end at 110; the next one ends at 120."""
    frames = chain(4, origin=OTHER)
    others = Others(frames[0].here)
    chains = Chains(
        OWN, b"c" * 16, tmp_path, Loop(), cast(Members, others),
        publish=lambda *_: None, durable=lambda *_: None, new_id=itertools.count(1).__next__,
    )  # fmt: skip
    try:
        chains.follow(OTHER, INCARNATION, Position(115))
        assert chains.whole_since(OTHER, chains.held()[OTHER]) == 115, "nobody says that there was nothing"
        others.watermark = 117
        assert chains.whole_since(OTHER, chains.held()[OTHER]) == 110, "the origin does"
        others.watermark = 0
        chains.live(OTHER, frames[1])
        assert chains.whole_since(OTHER, chains.held()[OTHER]) == 110, "the next frame does"
    finally:
        chains.close()


def test_a_held_chain(tmp_path: Path) -> None:
    frames = chain(8, origin=OTHER)
    others, taken = Others(frames[-1].here), Taken()
    ids = itertools.count(1)
    with opened(tmp_path) as journals:
        journals.open(OTHER, INCARNATION, START)
        follower = Follower(OTHER, journals, cast(Members, others), ids.__next__, cast(Listener, taken))
        follower.live(frames[0])
        follower.live(frames[2])  # a gap: a replay begins, and this one is kept for later
        (replay,) = others.asked
        follower.hold()
        assert others.asked[1:] == [{"op": "cancel", "id": replay["id"]}]
        follower.live(frames[1])
        follower.replayed(replay["id"], frames[1])
        follower.heard_head(frames[-1].here)
        follower.tick()
        assert taken.frames == frames[:1] and len(others.asked) == 2, "it neither takes nor asks"
        follower.release()
        again = others.asked[-1]
        assert (again["op"], again["position"]) == ("replay", list(frames[0].here))
        for each in frames[1:]:
            follower.replayed(again["id"], each)
        assert taken.frames == frames == read_all(journals, origin=OTHER)
