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
    from pmgsync.postgres.copy.local_server import LocalServer

CLOCK_S = 0.5
"""Less cannot be told: the answer has been under way, and the master has asked its database."""
ROOM_FACTOR = 1.5
"""The copy is loaded beside the old database, with its indexes and some WAL."""


@dataclass(frozen=True, slots=True)
class Here:
    """What is known of this node.

    Attributes:
        server: its server and database.
        free: bytes free where the server keeps its data, None when that is not on this machine.
        level: of its subscription, "" when not known.
    """

    server: LocalServer
    free: int | None
    level: str


def check_here(config: NodeConfig, profile: Profile) -> Here:
    """Check this node, without its tables: they are going to be replaced.

    Raises:
        PreflightError: with everything that must be put right first.
        UnreachableError: when the server does not answer.
        ConfigError: when the subscription level cannot be read.
    """
    from pmgsync.postgres.copy.local_server import examine_server
    from pmgsync.subscription import read_level

    server, found = examine_server(config.dsn, profile)
    raise_for([*port_findings(config), *found])
    return Here(server, _free(server.data_directory), read_level(config.subscription))


def _free(directory: str) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def check_there(config: NodeConfig, profile: Profile, here: Here, facts: Mapping[str, Any]) -> None:
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
            "version", version <= here.server.version,
            f"the master's server is PostgreSQL {version}, this node's is {here.server.version}: "
            "an earlier version cannot load a later one's schema",
            f"upgrade this node to PostgreSQL {version} or later",
        ),
        Finding(
            "server", system_id != here.server.system_id,
            "the dsn of this node leads to the master's own server, or to a physical copy of it",
            "each node needs a server of its own, made by initdb: correct [postgres] dsn in node.toml",
        ),
        judged(
            "subscription", config.subscription.differing == "warn" or not _level_problem(here, facts),
            _level_problem(here, facts), "change one of them, or set [subscription] differing in node.toml",
        ),
        place_finding(facts),
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


def place_finding(facts: Mapping[str, Any]) -> Finding:
    """Return what the master says of this node's name, address and key."""
    taken, cure = (printable(str(facts.get(key, ""))) for key in ("place_problem", "place_hint"))
    remedy = cure or "`pmgcm status` on the master shows the members"
    return judged("place", not taken, f"the master would not take this node: {taken}", remedy)


def announcement(config: NodeConfig, here: Here, facts: Mapping[str, Any], *, clock_ahead_s: float | None) -> str:
    """Return what is going to happen, for the person who is to agree to it.

    Args:
        clock_ahead_s: by how much the master's clock is ahead of this node's, None when it did not say.
    """
    server, members = here.server, facts.get("members")
    count = len(members) if isinstance(members, list) else 0
    if server.size is None:
        fate = f"The database {server.database!r} will be made on this node"
    else:
        fate = f"The database {server.database!r} on this node ({amount(server.size)}) will be REPLACED"
    nodes = f"{count} node{'s' if count != 1 else ''}"
    cluster = printable(str(facts.get("cluster")))
    lines = [
        f"This node, {config.name} ({config.address}), will join the cluster {cluster!r} of {nodes}.",
        f"{fate} by a copy of the master's ({amount(int(facts['bytes']))}).",
        *_own_rows(server),
    ]
    if server.users:
        who = ", ".join(f"{printable(name)} ({sessions})" for name, sessions in server.users)
        lines.append(f"It is in use now, and these sessions will be ended: {who}.")
    if server.was_member:
        lines.append("It belonged to a cluster before; what is left of that will be removed.")
    if here.free is not None:
        lines.append(f"Free where the server keeps its data: {amount(here.free)}.")
    if clock_ahead_s is not None:
        lines.append(f"Clocks: {_clocks(clock_ahead_s)}.")
    return "\n".join([*lines, *_differences(here, facts)])


def _own_rows(server: LocalServer) -> list[str]:
    """Return what the node has written itself, in numbers: nobody else has it."""
    if not server.own_rows:
        return []
    lines = ["What this node has of its own is in no copy, and will be GONE:"]
    for table in server.own_rows:
        since = f", the oldest of {table.oldest}" if table.oldest else ""
        lines.append(f"  {printable(table.table)}: {table.rows:,} row{'s' if table.rows != 1 else ''}{since}")
    return lines


def _clocks(ahead_s: float) -> str:
    if abs(ahead_s) < CLOCK_S:
        return f"the master's and this node's differ by less than {CLOCK_S:g} s"
    return (
        f"the master's is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this node's; synchronise them"
    )


def _differences(here: Here, facts: Mapping[str, Any]) -> list[str]:
    """Return what is not the same on both sides, and need not be for joining."""
    from pmgsync import __version__

    lines = []
    product, schema = printable(str(facts.get("product", __version__))), facts.get("schema_digest")
    if product != __version__:
        lines.append(
            f"Versions: pmgsync {__version__} here, {product} on the master; install the same everywhere soon."
        )
    if here.server.schema and isinstance(schema, str) and schema and schema != here.server.schema:
        lines.append(
            "Tables: this node's are not the same as the master's. The master's come with the copy: see that the "
            "programs here are of the same version as there."
        )
    if problem := _level_problem(here, facts):
        lines.append(f"Subscription: {problem}.")
    return lines


def _level_problem(here: Here, facts: Mapping[str, Any]) -> str:
    from pmgsync.subscription import level_difference

    return level_difference(here.level, printable(str(facts.get("level", ""))))
