"""What `pmgcm join` checks on both sides before anything changes, and what it says is going to happen."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.console import amount, printable
from cli.port_checks import port_findings
from pmgsync.core.findings import Finding, judged, raise_for
from pmgsync.errors import ProtocolError

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.profile import Profile

ROOM_FACTOR = 1.5
"""The copy is loaded beside the old database, with its indexes and some WAL."""


@dataclass(frozen=True, slots=True)
class Here:
    """What is known of this node's server.

    Attributes:
        version: major version of PostgreSQL.
        database: name of the database that is to be replaced.
        size: its bytes, None when there is none yet.
        was_member: True when it was set up for a cluster before.
        free: bytes free where the server keeps its data, None when that is not on this machine.
    """

    version: int
    system_id: str
    database: str
    size: int | None
    was_member: bool
    free: int | None


def check_here(config: NodeConfig, profile: Profile) -> Here:
    """Check this node, without its tables: they are going to be replaced.

    Raises:
        PreflightError: with everything that must be put right first.
        UnreachableError: when the server does not answer.
    """
    from pmgsync.postgres.copy.local_server import examine_server

    server, found = examine_server(config.dsn, profile)
    raise_for([*port_findings(config), *found])
    return Here(
        server.version, server.system_id, server.database, server.size, server.was_member, _free(server.data_directory)
    )


def _free(directory: str) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def check_there(profile: Profile, here: Here, facts: Mapping[str, Any]) -> None:
    """Check that this node's server and profile fit the cluster's.

    Raises:
        PreflightError: with everything that must be put right first.
        ProtocolError: when the master's facts are malformed.
    """
    try:
        version = int(facts["server_version"]) // 10000
        size = int(facts["bytes"])
        # A master of an earlier version does not say whether it can give a snapshot; joining tells then.
        cannot, cure = (str(facts.get(key, "")) for key in ("snapshot_problem", "snapshot_hint"))
        digest, name, system_id = (str(facts[key]) for key in ("profile_digest", "profile", "system_id"))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the master's answer lacks what a newcomer must know ({error})") from error
    findings = [
        Finding(
            "profile", digest == profile.digest,
            f"the cluster's profile {printable(name)!r} is not the same as this node's {profile.name!r}",
            "set [node] profile in node.toml as on the master, and install the same version of pmgsync",
        ),
        Finding(
            "version", version <= here.version,
            f"the master's server is PostgreSQL {version}, this node's is {here.version}: "
            "an earlier version cannot load a later one's schema",
            f"upgrade this node to PostgreSQL {version} or later",
        ),
        Finding(
            "server", system_id != here.system_id,
            "the dsn of this node leads to the master's own server, or to a physical copy of it",
            "each node needs a server of its own, made by initdb: correct [postgres] dsn in node.toml",
        ),
        judged("snapshot", not cannot, f"the master cannot give a snapshot: {printable(cannot)}", printable(cure)),
    ]  # fmt: skip
    need = round(size * ROOM_FACTOR)
    if here.free is not None:
        findings.append(
            Finding(
                "room", here.free >= need,
                f"the copy needs about {amount(need)} beside the old database, {amount(here.free)} are free",
                "make room where the server keeps its data",
            )
        )  # fmt: skip
    raise_for(findings)


def announcement(config: NodeConfig, here: Here, facts: Mapping[str, Any]) -> str:
    """Return what is going to happen, for the person who is to agree to it."""
    members = facts.get("members")
    count = len(members) if isinstance(members, list) else 0
    if here.size is None:
        fate = f"The database {here.database!r} will be made on this node"
    else:
        fate = f"The database {here.database!r} on this node ({amount(here.size)}) will be REPLACED"
    nodes = f"{count} node{'s' if count != 1 else ''}"
    cluster = printable(str(facts.get("cluster")))
    lines = [
        f"This node, {config.name} ({config.address}), will join the cluster {cluster!r} of {nodes}.",
        f"{fate} by a copy of the master's ({amount(int(facts['bytes']))}).",
    ]
    if here.was_member:
        lines.append("It belonged to a cluster before; what is left of that will be removed.")
    return "\n".join(lines)
