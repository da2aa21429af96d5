"""This node as it stands, or is to stand, in a cluster document."""

from __future__ import annotations

from dataclasses import replace

from broker.net.keys import NodeKeys
from pmgsync.config import NodeConfig
from pmgsync.core.membership import ClusterDocument, Member
from pmgsync.errors import ConfigError
from pmgsync.gateway import read_host_keys
from pmgsync.profile_file import load_profile
from pmgsync.subscription import read_level

FIRST_CID = 1
"""CID of the node that creates a cluster; the master gives CIDs to all others."""


def own_member(config: NodeConfig, keys: NodeKeys) -> Member:
    """Return this node as a member; it has the first CID until a master gives it another.

    Raises:
        ProtocolError: when its name or address cannot stand in a document.
        ConfigError: when its subscription level or one of its host's keys cannot be read.
    """
    profile = load_profile(config.profile)
    member = replace(
        _member(config, keys), level=read_level(config.subscription), host_keys=read_host_keys(config, profile)
    )
    return Member.from_map(member.to_map())


def own_witness(config: NodeConfig, keys: NodeKeys) -> Member:
    """Return this machine as a witness.

    Raises:
        ProtocolError: when its name or address cannot stand in a document.
    """
    return Member.from_map(replace(_member(config, keys), role="witness").to_map())


def _member(config: NodeConfig, keys: NodeKeys) -> Member:
    return Member(
        cid=FIRST_CID,
        name=config.name,
        address=config.address,
        events=config.events_port,
        control=config.control_port,
        join=config.join_port,
        curve_key=keys.curve_public,
        sign_key=keys.sign_public,
    )


def check_identity(config: NodeConfig, document: ClusterDocument, cid: int) -> None:
    """Refuse to be a second node of one CID: a copied state directory comes with another address or name."""
    member = document.member(cid)
    assert member is not None
    if (member.name, member.address) != (config.name, config.address):
        raise ConfigError(
            f"the cluster knows node {cid} as {member.name} at {member.address}, "
            f"node.toml says {config.name} at {config.address}",
            hint="name and address cannot change later: correct node.toml, or delete the node and join anew; "
            "a copied state directory must not be started as a second node",
        )
