"""`pmgcm doctor`: holds profile, database and node against each other; every finding comes with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, printable, say, say_json

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.findings import Finding
    from pmgsync.core.membership import ClusterDocument
    from pmgsync.core.profile import Profile


def doctor(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: {ok, findings: [{check, ok, problem, remedy}]}")
    ] = False,
) -> None:
    """Check the profile against the live database and this node. Exit code 1 when something is to be put right."""
    from cli.local_node import load
    from pmgsync.profile_file import load_profile

    config = load(context)
    findings = list(examine(config, load_profile(config.profile)))
    well = all(finding.ok for finding in findings)
    if as_json:
        fields = ("check", "ok", "problem", "remedy")
        say_json({"ok": well, "findings": [{name: getattr(finding, name) for name in fields} for finding in findings]})
    else:
        for finding in findings:
            say(_line(finding))
            if finding.remedy:
                say(f"{'':8}{printable(finding.remedy)}")
    if not well:
        raise CommandFailedError


def _line(finding: Finding) -> str:
    word = "note" if finding.ok and finding.problem else "ok" if finding.ok else "FAIL"
    text = f": {printable(finding.problem)}" if finding.problem else ""
    return f"{word:<6}  {printable(finding.check)}{text}"


def examine(config: NodeConfig, profile: Profile) -> Iterator[Finding]:
    """Yield what all checks find.

    Raises:
        UnreachableError: when the database does not answer.
        PmgsyncError: when another check could not run.
    """
    from cli.cluster_checks import check_cluster
    from cli.node_checks import check_node
    from pmgsync.postgres.setup.checks import check_database

    document, cid = _document(config)
    status = _status(config)
    yield from check_node(config, running=status is not None)
    if document is None or not document.is_witness(cid):
        yield from check_database(config.dsn, profile, document, cid)
    yield from check_cluster(status, document, profile)


def _document(config: NodeConfig) -> tuple[ClusterDocument | None, int]:
    """Return the cluster document and this node's CID, None and 0 when there is none."""
    from cli.local_node import cluster_defined, held_documents

    if not cluster_defined(config):
        return None, 0
    documents = held_documents(config)
    return (documents.signed.document, documents.cid) if documents.signed is not None else (None, 0)


def _status(config: NodeConfig) -> dict[str, Any] | None:
    """Return the broker's status, {} when it runs without a cluster, None when it does not answer."""
    from cli.local_node import broker, read_status
    from pmgsync.errors import PmgsyncError, UnreachableError

    try:
        with broker(config, timeout_s=2.0) as link:
            try:
                return read_status(link, timeout_s=2.0)
            except UnreachableError:
                return None
            except PmgsyncError:
                return {}
    except UnreachableError:
        return None
