"""Which members can fill a gap in a chain, by what they say that they hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from broker.heartbeats.heartbeat import HeldChain
from pmgsync.core.positions import Position


def sources(origin: int, position: Position, holding: Mapping[int, HeldChain]) -> list[int]:
    """Return the members that hold what follows a position, the origin first.

    Args:
        holding: by CID, what the members that are up hold of this incarnation of the chain.
    """
    found = [cid for cid, chain in holding.items() if chain.first <= position < chain.head]
    return sorted(found, key=lambda cid: (cid != origin, cid))


def forgotten_by_all(position: Position, holding: Mapping[int, HeldChain]) -> bool:
    """Return True when everybody's part of the chain begins after a position."""
    return bool(holding) and all(chain.first > position for chain in holding.values())
