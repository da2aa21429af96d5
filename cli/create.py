"""`pmgcm create`: checks this node, makes its database the first of a cluster, and signs the cluster document."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import note, say
from cli.port_checks import port_findings
from cli.witness import SUGGESTION
from pmgsync.errors import MembershipError, PmgsyncError

if TYPE_CHECKING:
    from broker.cluster.state_directory import StateDirectory
    from pmgsync.config import NodeConfig
    from pmgsync.core.findings import Finding
    from pmgsync.core.profile import Profile

CLUSTER_ID_BYTES = 16
BEGUN_FILE = "create.begun"
"""Stands in the state directory from before the database is changed until the cluster document is stored, so that
what an interrupted `create` left in the database can be told from a cluster."""


def create(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(metavar="CLUSTERNAME", help="Default: this node's name")] = None,
) -> None:
    """Make this node the master of a new cluster. Its database is checked first; nothing is left half made."""
    from broker.cluster.identity import FIRST_CID
    from broker.cluster.state_directory import StateDirectory
    from cli.local_node import held_documents, load
    from cli.services import stopped
    from pmgsync.profile_file import load_profile

    config = load(context)
    profile = load_profile(config.profile)
    state = StateDirectory(config.state_dir)
    held_documents(config).refuse_second()
    _clear_interrupted(config, state)
    _check(config, profile)
    cluster, cluster_name = secrets.token_bytes(CLUSTER_ID_BYTES), name or config.name
    with stopped(profile.services, config.state_dir):
        _set_up(config, profile, state, cluster, cluster_name)
    say(f"cluster {cluster_name!r} was created; this node is its master, {config.name}({FIRST_CID})")
    note("the line that lets another node join: pmgcm join-cmd")
    if config.cluster.fence == "lease":
        note(f"note: {SUGGESTION}")


def _clear_interrupted(config: NodeConfig, state: StateDirectory) -> None:
    """Remove from the database what a `create` that was killed had made."""
    from pmgsync.postgres.setup.provision import deprovision

    marker = state.path / BEGUN_FILE
    if marker.exists():
        note("an earlier `pmgcm create` was interrupted; removing what it left in the database")
        deprovision(config.dsn)
        marker.unlink()


def _check(config: NodeConfig, profile: Profile) -> None:
    """Check this node.

    Raises:
        PreflightError: with everything that must be put right first.
        MembershipError: when the database belongs to a cluster.
    """
    from pmgsync.core.findings import raise_for
    from pmgsync.postgres.session import connect
    from pmgsync.postgres.setup.node_row import node_facts
    from pmgsync.postgres.setup.preflight import check_server

    findings = port_findings(config)
    with contextlib.closing(connect(config.dsn, application_name="pmgcm create")) as connection:
        if node_facts(connection) is not None:
            raise MembershipError(
                "cluster already defined",
                hint=f"this database belongs to one, though {config.state_dir} holds no cluster document",
            )
        findings += check_server(connection, profile)
    raise_for(findings)
    tell_informational(findings)


def tell_informational(findings: Iterable[Finding]) -> None:
    """Tell a person what checks have found that nobody need do anything about."""
    for finding in findings:
        if finding.ok and finding.problem:
            note(f"note: {finding.problem}")


def _set_up(config: NodeConfig, profile: Profile, state: StateDirectory, cluster: bytes, cluster_name: str) -> None:
    """Change the database, then store the document; the database is put back when either fails."""
    from broker.cluster.identity import FIRST_CID, own_member
    from cli.local_node import change_cluster
    from pmgsync.postgres.session import connect
    from pmgsync.postgres.setup.inventory import highest_owner
    from pmgsync.postgres.setup.provision import provision

    with _undone_on_failure(config, state, cluster):
        provision(
            config.dsn,
            profile,
            cid=FIRST_CID,
            cluster=cluster,
            needs_snapshot=True,
            take_over_cid0=True,
            progress=note,
        )
        with contextlib.closing(connect(config.dsn, application_name="pmgcm create")) as connection:
            used = highest_owner(connection, profile)
        request = {
            "op": "cluster.create", "cluster": cluster, "name": cluster_name, "profile": profile.name, "used": used,
        }  # fmt: skip
        change_cluster(
            config,
            request,
            offline=lambda documents: documents.create(
                cluster,
                cluster_name,
                profile.name,
                own_member(config, state.keys()),
                fence_wanted=config.cluster.fence,
                lease_ms=round(config.cluster.lease_s * 1000),
                used=used,
            ),
            done=lambda documents: documents.is_member_of(cluster),
        )


@contextlib.contextmanager
def _undone_on_failure(config: NodeConfig, state: StateDirectory, cluster: bytes) -> Iterator[None]:
    """Put the database back when what is done in here fails, unless the cluster document is stored already."""
    from cli.local_node import held_documents
    from pmgsync.postgres.setup.provision import deprovision
    from pmgsync.private_files import write_private

    marker = state.path / BEGUN_FILE
    write_private(marker, b"")
    try:
        yield
    except BaseException as error:
        if not held_documents(config).is_member_of(cluster):
            try:
                deprovision(config.dsn)
            except PmgsyncError as second:
                # The marker stays: the next `create` finishes this.
                error.add_note(f"what was made in the database could not be removed now ({second})")
                raise error from None
        marker.unlink(missing_ok=True)
        raise
    marker.unlink(missing_ok=True)
