"""`pmgcm resync`: fetches this node's copies anew, all of them, those of one node's rows, or those of one table."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, note, printable, say
from pmgsync.errors import MembershipError, UnreachableError

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.membership import ClusterDocument
    from pmgsync.core.profile import Profile
    from pmgsync.wire.link import BrokerLink

TableName = tuple[bytes, bytes]
Wanted = dict[int, list[TableName]]
"""Tables by the origin that they are fetched from."""

SILENT_S = 5.0
LOOK_S = 0.5
PATIENCE_S = 120.0
"""Without any progress for so long, the command ends; what it has begun goes on."""


def resync(
    context: typer.Context,
    cid: Annotated[int | None, typer.Argument(metavar="[CID]", help="Fetch what this node answers for")] = None,
    table: Annotated[
        str, typer.Option(metavar="TABLE", help="Fetch this table: NAME in schema public, or SCHEMA.NAME")
    ] = "",
) -> None:
    """Fetch this node's copies anew from the nodes that answer for them, while everything goes on."""
    from cli.local_node import load, member_broker
    from pmgsync.core.signed import SignedDocument
    from pmgsync.postgres.copy.checksums import fetch_again
    from pmgsync.postgres.copy.refetch import ASKED_FOR
    from pmgsync.profile_file import load_profile

    config = load(context)
    profile = load_profile(config.profile)
    with member_broker(config) as link:
        _, parts = link.request({"op": "document"})
        document = SignedDocument.unpack(parts[0]).document
        own = int(link.hello()[0]["cid"])
        wanted = _wanted(config, profile, document, own, cid, table)
        _refuse_silent(link, wanted)
        for origin, tables in wanted.items():
            note(f"fetching {_names(tables)} from node {origin}")
            fetch_again(config.dsn, origin, tables, ASKED_FOR)
        _await(config, link, own, wanted)
    say(f"fetched: {_count(wanted)} from {', '.join(f'node {origin}' for origin in wanted)}")


def _wanted(
    config: NodeConfig, profile: Profile, document: ClusterDocument, own: int, cid: int | None, table: str
) -> Wanted:
    """Return what is to be fetched from whom.

    Raises:
        MembershipError: when there is nothing that another node answers for.
    """
    from pmgsync.core.owners import Writers
    from pmgsync.postgres.catalog import as_bytes
    from pmgsync.postgres.copy.refetch import answered_tables

    if cid == own:
        raise MembershipError("this node answers for its own rows, nobody else has them to be fetched from")
    if cid is not None and cid not in document.cids:
        raise MembershipError(f"there is no node {cid} in the cluster", hint="`pmgcm status` shows the members")
    if document.master == own and cid is None and not table:
        raise MembershipError(
            "this node is the master: the others copy its tables, and nobody has them to be fetched from",
            hint="`pmgcm resync CID` fetches the rows that another node owns; `pmgcm verify` compares all nodes",
        )
    holders = [member.cid for member in document.members if member.role != "witness" and member.cid != own]
    origins = holders if cid is None else [cid]
    answered = {
        origin: answered_tables(config.dsn, profile, Writers.at(origin, document.master, document.cids))
        for origin in origins
    }
    if table:
        schema, dot, name = table.partition(".")
        key = (as_bytes(schema), as_bytes(name)) if dot else (b"public", as_bytes(table))
        own_tables = answered_tables(config.dsn, profile, Writers.at(own, document.master, document.cids))
        found = {origin: [key] for origin, tables in answered.items() if key in tables}
        if not found and key in own_tables:
            raise MembershipError(f"this node is the master, and answers for the whole table {table} itself")
        if not found:
            raise MembershipError(
                f"there is no table {table} here that the profile has synchronised"
                + (f" and node {cid} answers for" if cid is not None else ""),
                hint="give its name as the database has it, with its schema when that is not public",
            )
        return found
    wanted = {origin: sorted(tables) for origin, tables in answered.items() if tables}
    if not wanted:
        raise MembershipError(f"{'no other node' if cid is None else f'node {cid}'} answers for rows of any table")
    return wanted


def _refuse_silent(link: BrokerLink, origins: Iterable[int]) -> None:
    """Refuse before anything is begun when a node does not answer.

    Raises:
        UnreachableError: names those that do not.
    """
    from cli.local_node import read_status

    ages = {node["cid"]: node["heartbeat_age_s"] for node in read_status(link)["nodes"]}
    silent = [f"node {origin}" for origin in origins if ages.get(origin) is None or ages[origin] > SILENT_S]
    if silent:
        raise UnreachableError(
            f"{', '.join(silent)} does not answer, so that nothing can be fetched from there",
            hint="try again when `pmgcm status` shows it, or name another node: pmgcm resync CID",
        )


def _await(config: NodeConfig, link: BrokerLink, own: int, wanted: Wanted) -> None:
    """Show how far it is, until everything has come.

    Raises:
        CommandFailedError: when nothing moves any more.
    """
    from cli.local_node import read_status
    from pmgsync.postgres.copy.refetch import waiting_tables

    told: list[str] = []
    moved = time.monotonic()
    while True:
        left = {
            origin: [name for name in waiting_tables(config.dsn, origin) if name in tables]
            for origin, tables in wanted.items()
        }
        if not any(left.values()):
            return
        lines = _progress(read_status(link), own)
        if lines != told:
            told, moved = lines, time.monotonic()
            for line in lines:
                note(printable(line))
        if time.monotonic() - moved > PATIENCE_S:
            for origin, tables in left.items():
                if tables:
                    note(f"not fetched from node {origin} yet: {_names(tables)}; it is tried again by itself")
            raise CommandFailedError
        time.sleep(LOOK_S)


def _progress(status: Mapping[str, Any], own: int) -> list[str]:
    (node,) = (each for each in status["nodes"] if each["cid"] == own)
    running = [alert["text"] for alert in node["alerts"] if alert["kind"] == "resync"]
    return running + ([node["error"]] if node["error"] else [])


def _names(tables: Collection[TableName]) -> str:
    shown = [".".join(part.decode(errors="backslashreplace") for part in name) for name in sorted(tables)]
    return printable(", ".join(shown))


def _count(wanted: Wanted) -> str:
    count = len({name for tables in wanted.values() for name in tables})
    return "1 table" if count == 1 else f"{count} tables"
