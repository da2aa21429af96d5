"""`pmgcm doctor`: holds profile, database and node against each other; every finding comes with its remedy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, amount, printable, say, say_json

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.membership import ClusterDocument
    from pmgsync.core.profile import Profile
    from pmgsync.postgres.setup.preflight import Finding

LEAST_FREE_BYTES = 1 << 30


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
    from pmgsync.postgres.setup.checks import check_database

    document, cid = _document(config)
    status = _status(config)
    yield from _check_node(config, status is not None)
    yield from check_database(config.dsn, profile, document, cid)
    yield from _check_cluster(status, document, profile)


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


# -- the node ----------------------------------------------------------------------------------------------------------


def _check_node(config: NodeConfig, running: bool) -> Iterator[Finding]:
    from cli.port_checks import port_findings
    from pmgsync.postgres.setup.preflight import Finding

    bad = [] if running else port_findings(config)
    yield from bad or [Finding("ports", True)]
    directory = config.state_dir
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    yield Finding("state directory", True) if os.access(directory, os.W_OK | os.X_OK) else Finding(
        "state directory", False, f"{directory} cannot be written to by this user",
        "run pmgcm as the user of the services, or give that user the directory",
    )  # fmt: skip
    free, limit = shutil.disk_usage(directory).free, config.journal.max_bytes
    if free < LEAST_FREE_BYTES:
        text = f"{amount(free)} are free for the journal in {directory}"
        yield Finding("disk", False, text, "make room: capture stops when the journal cannot be written")
    elif free < limit:
        text = f"{amount(free)} are free in {directory}, each chain's journal may grow to {amount(limit)}"
        yield Finding("disk", True, text, "make room, or set [journal] max_size in node.toml")
    else:
        yield Finding("disk", True)


def _check_cluster(
    status: dict[str, Any] | None, document: ClusterDocument | None, profile: Profile
) -> Iterator[Finding]:
    from cli.status import clock_problem
    from pmgsync.postgres.setup.preflight import Finding

    if document is None:
        return
    if status is None:
        yield Finding(
            "broker", False, "pmgsync-broker does not answer here", "start it: systemctl start pmgsync-broker"
        )
        return
    yield Finding("broker", True)
    for node in status.get("nodes", ()):
        if node["error"]:
            yield Finding("members", False, f"{node['name']}({node['cid']}): {node['error']}", "see `pmgcm status`")
        if skew := clock_problem(node):
            why = ": rules that take the latest value compare them" if profile.compares_times else ""
            yield Finding(
                "clocks", not profile.compares_times, f"the clock of {node['name']}({node['cid']}) is {skew}",
                f"synchronise the clocks (chrony, systemd-timesyncd){why}",
            )  # fmt: skip
