"""`pmgcm divergence`: what this node had written that does not count: shown, made again on the master, or dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import CommandFailedError, confirm, note, printable, say, say_json
from pmgsync.errors import MembershipError, PmgsyncError

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.divergence import Diverged, DivergenceFile, Values
    from pmgsync.core.stretches import Stretch
    from pmgsync.divergence_files import Export

divergence = typer.Typer(
    help="What this node had written as master, or taken over, that does not count: list, show, replay, drop.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Id = Annotated[str, typer.Argument(metavar="ID", help="As `pmgcm divergence list` shows it")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")]


@divergence.command("list")
def list_files(context: typer.Context, as_json: Json = False) -> None:
    """Show the divergence files of this node, and what is still being exported. Exit code 1 when one cannot be read."""
    from cli.local_node import load
    from pmgsync.divergence_files import DivergenceFiles

    files, problems = DivergenceFiles(load(context).state_dir), list[PmgsyncError]()
    pending, exports = files.pending(), files.exports(problems.append)
    folders = [(name, files.files_in(name)) for name in files.folders()]
    if as_json:
        say_json(
            {
                "files": [_summary(each) for each in exports],
                "pending": [_pending(each) for each in pending],
                "configurations": [_folder(name, found) for name, found in folders],
                "problems": [str(each) for each in problems],
            }
        )
    else:
        for each in exports:
            say(_line(each))
        for stretch in pending:
            say(f"{stretch.id}  being exported: what node {stretch.origin} wrote after {stretch.what}")
        for name, found in folders:
            say(f"{name}  {len(found)} files of a configuration that do not count")
        if not (exports or pending or problems or folders):
            say("nothing has diverged on this node")
        for problem in problems:
            note(f"error: {problem}")
    if problems:
        raise CommandFailedError


@divergence.command()
def show(context: typer.Context, name: Id, as_json: Json = False) -> None:
    """Show the changes in a divergence file; with --json its lines as they are."""
    from cli.local_node import load
    from pmgsync.divergence_files import DivergenceFiles

    files = DivergenceFiles(load(context).state_dir)
    if name in files.folders():
        found = files.files_in(name)
        if as_json:
            say_json(_folder(name, found))
        else:
            for path, size in found:
                say(f"{printable(path)}, {size} bytes, kept in {printable(str(files.path / name))}")
        return
    export = files.read(name)
    if as_json:
        with export.path.open(encoding="ascii") as file:
            for line in file:
                say(line.rstrip("\n"))
        return
    say(_line(export))
    for change in export.file.changes:
        say(f"  {_change(change)}")


@divergence.command()
def replay(
    context: typer.Context,
    name: Id,
    force: Annotated[bool, typer.Option("--force", help="Also overwrite what has changed since")] = False,
    as_json: Json = False,
) -> None:
    """Make the changes of a divergence file again on this node, the master. Exit code 1 when some were not made."""
    from cli.local_node import load
    from pmgsync.core.divergence import change_map
    from pmgsync.postgres.replay import replay as make_again

    config = load(context)
    file = _fetched(config, name)
    results = []
    outcomes: Counter[str] = Counter()
    for done in make_again(config.dsn, file.changes, force=force):
        outcomes[done.outcome] += 1
        if as_json:
            now = None if done.now is None else _texts(done.now)
            results.append(
                {"change": change_map(done.change), "outcome": done.outcome, "reason": done.reason, "now": now}
            )
        elif done.reason:
            what = "overwritten" if done.outcome == "forced" else "conflict"
            there = "" if done.now is None else f"; it is {_row(done.now)}"
            say(f"{what}: {_change(done.change)}: {printable(done.reason)}{there}")
    if as_json:
        say_json({"id": name, "outcomes": dict(outcomes), "changes": results})
    else:
        counts = ", ".join(f"{outcomes[kind]} {text}" for kind, text in _OUTCOMES.items() if outcomes[kind])
        say(counts or "there is nothing in it to be made again")
    if outcomes["conflict"]:
        if not as_json:
            note("hint: look at each conflict; --force overwrites what is there")
        raise CommandFailedError


_OUTCOMES = {
    "done": "changes made",
    "there": "were there already",
    "forced": "overwrote what was there",
    "conflict": "not made",
}


@divergence.command()
def drop(
    context: typer.Context, name: Id, yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False
) -> None:
    """Remove a divergence file of this node for good."""
    from cli.local_node import load
    from pmgsync.divergence_files import DivergenceFiles

    files = DivergenceFiles(load(context).state_dir)
    if name not in [*files.names(), *files.folders()]:
        files.drop(name)  # says that there is none
    if not yes:
        try:
            if name in files.folders():
                what = f"{len(files.files_in(name))} files of a configuration"
            else:
                what = f"{len(files.read(name).file.changes)} changes that are nowhere else"
        except PmgsyncError as error:
            what = f"a file that cannot be read ({error.message})"
        confirm(f"{what} will be removed.")
    files.drop(name)
    say(f"{name} was removed")


def _fetched(config: NodeConfig, name: str) -> DivergenceFile:
    """Return a divergence file, from the node that has it.

    Raises:
        MembershipError: on a node that is not the master.
    """
    from cli.local_node import member_broker
    from pmgsync.core.divergence import read_lines
    from pmgsync.core.membership import SignedDocument, require_master
    from pmgsync.divergence_files import DivergenceFiles, node_of

    with member_broker(config) as link:
        welcome, parts = link.hello()
        own, document = int(welcome["cid"]), SignedDocument.unpack(parts[0]).document
        require_master(document, own)
        node = node_of(name)
        if node == own:
            return DivergenceFiles(config.state_dir).read(name).file
        if node not in document.cids:
            raise MembershipError(f"there is no node {node} in the cluster, whose divergence {name!r:.80} would be")
        data = b"".join(
            b"".join(attachments)
            for message, attachments in link.call("divergence.read", {"id": name}, target=node)
            if message["op"] == "data"
        )
    return read_lines(data.decode("ascii", "replace").splitlines())


def _summary(export: Export) -> dict[str, Any]:
    from pmgsync.core.positions import format_lsn

    file = export.file
    return {
        "id": export.id,
        "epoch": file.epoch,
        "origin": file.what.origin,
        "after": format_lsn(file.what.after),
        "upto": format_lsn(file.what.upto),
        "changes": len(file.changes),
        "transactions": len({change.lsn for change in file.changes}),
        "tables": _tables(file.changes),
        "missing": file.missing,
    }


def _folder(name: str, found: Iterable[tuple[str, int]]) -> dict[str, Any]:
    return {"id": name, "files": [{"path": path, "bytes": size} for path, size in found]}


def _pending(stretch: Stretch) -> dict[str, Any]:
    return {"id": stretch.id, "epoch": stretch.epoch, "origin": stretch.origin}


def _tables(changes: Iterable[Diverged]) -> list[str]:
    found = {b".".join((change.schema, change.table)) for change in changes if change.table}
    return sorted(name.decode("utf-8", "surrogateescape") for name in found)


def _line(export: Export) -> str:
    file = export.file
    tables = ", ".join(map(printable, _tables(file.changes))) or "none"
    text = (
        f"{export.id}  {len(file.changes)} changes of node {file.what.origin} that do not count in epoch {file.epoch} "
        f"({file.what}), tables: {tables}"
    )
    return f"{text}; {printable(file.missing)}" if file.missing else text


def _change(change: Diverged) -> str:
    table = b".".join((change.schema, change.table)).decode("utf-8", "surrogateescape")
    text = f"{change.kind} {printable(table)}"
    if change.key:
        text += f" {_row(change.key)}"
    if change.old and change.old != change.key:
        text += f" was {_row(change.old)}"
    return f"{text} -> {_row(change.new)}" if change.new is not None else text


def _row(values: Values) -> str:
    shown = ", ".join(f"{name}={'NULL' if value is None else value}" for name, value in _texts(values).items())
    return f"({printable(shown)})"


def _texts(values: Values) -> dict[str, str | None]:
    return {
        name.decode("utf-8", "surrogateescape"): None if value is None else value.decode("utf-8", "surrogateescape")
        for name, value in values.items()
    }
