"""This node as it stands in a cluster document."""

from __future__ import annotations

from broker.net.keys import NodeKeys
from pmgsync.config import NodeConfig
from pmgsync.core.membership import Member

FIRST_CID = 1
"""Of the node that creates a cluster; the master gives all others theirs."""


def own_member(config: NodeConfig, keys: NodeKeys) -> Member:
    """Return this node as a member; its CID is that of a founder until a master says another.

    Raises:
        ProtocolError: when its name or address cannot stand in a document.
    """
    member = Member(
        cid=FIRST_CID,
        name=config.name,
        address=config.address,
        events=config.events_port,
        control=config.control_port,
        join=config.join_port,
        curve_key=keys.curve_public,
        sign_key=keys.sign_public,
    )
    return Member.from_map(member.to_map())
