"""`pmgcm backup`: this node's tables at one instant and its configuration files, in one file that proves itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import amount, note, printable, say, say_json
from pmgsync import __version__
from pmgsync.core.backups import About, Contents, Record

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.profile import FileTree, Profile
    from pmgsync.postgres.copy.backup import ServerFacts

CONTENT_BYTES = 256 << 10


def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup")],
    show: Annotated[bool, typer.Option("--show", help="Show what is in a backup that is there, and prove it")] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Include the tables that the profile calls statistics")
    ] = False,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt it under a passphrase, which is asked")] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Encrypt under the passphrase in this file's first line")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file when it is there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Write a backup of this node's tables and configuration files, without anything of a cluster in it."""
    from cli.backup_file import BackupFile, known_passphrase, new_passphrase, write_backup
    from cli.local_node import load
    from pmgsync.profile_file import load_profile

    if show:
        with BackupFile(file, known_passphrase(passphrase_file)) as found:
            contents = found.check()
            show_contents(contents, encrypted=found.encrypted, size=found.size, as_json=as_json)
        return
    config = load(context)
    taking = _Taking(config, load_profile(config.profile), statistics=statistics)
    passphrase = new_passphrase(passphrase_file, encrypt=encrypt)
    size = write_backup(file, taking.records(), passphrase, overwrite=overwrite)
    show_contents(taking.contents, encrypted=passphrase is not None, size=size, as_json=as_json)


class _Taking:
    """Makes the records of a new backup.

    Attributes:
        contents: what they are, complete when all were made.
    """

    def __init__(self, config: NodeConfig, profile: Profile, *, statistics: bool) -> None:
        self.contents = Contents()
        self._config = config
        self._profile = profile
        self._statistics = statistics

    def records(self) -> Iterator[Record]:
        """Yield them in order.

        Raises:
            PmgsyncError: when something cannot be read.
        """
        for record, attachment in self._records():
            self.contents.take(record, attachment)
            yield record, attachment
        end = self.contents.end()
        self.contents.take(end, None)
        yield end, None

    def _records(self) -> Iterator[Record]:
        from cli.progress import SnapshotProgress
        from pmgsync.postgres.copy.backup import take_backup

        begun_us = time.time_ns() // 1000
        estimate = 0
        with SnapshotProgress("backup", "the backup") as progress:
            for piece, attachment in take_backup(self._config.dsn, self._profile, statistics=self._statistics):
                match piece["kind"]:
                    case "wait":
                        progress.waiting(piece.get("for", ""))
                        continue
                    case "plan":
                        estimate = piece["bytes"]
                        _tell_left_out(piece["left_out"])
                        yield self._about(piece["facts"], begun_us).to_map(), None
                    case _:
                        yield piece, attachment
                progress.show(self.contents.size, self.contents.rows, estimate)
        for rule in self._profile.files:
            if rule.kind == "config":
                yield from _tree(rule, self._config.root_of(rule))

    def _about(self, facts: ServerFacts, made_us: int) -> About:
        return About(
            made_us=made_us, node=self._config.name, profile=self._profile.name, profile_digest=self._profile.digest,
            statistics=self._statistics, database=facts.database, encoding=facts.encoding, server=facts.server,
            software=__version__,
        )  # fmt: skip


def _tell_left_out(tables: list[tuple[str, str]]) -> None:
    for reason, text in (("statistics", "statistics, left out without --statistics"), ("never", "never in a backup")):
        if names := [label for label, kind in tables if kind == reason]:
            note(f"{text}: {printable(', '.join(names))}")


def _tree(rule: FileTree, path: Path) -> Iterator[Record]:
    from pmgsync.core.manifests import pack_changes
    from pmgsync.files.archive import archive_tree

    findings: dict[bytes, str] = {}
    yield {"kind": "tree", "root": rule.root, "present": path.is_dir()}, None
    entries = 0
    for item in archive_tree(rule, path, findings):
        entries += 1
        yield {"kind": "file"}, pack_changes([(item.name, item.entry)])
        left = item.entry.size
        while item.content is not None and left and (data := item.content.read(min(CONTENT_BYTES, left))):
            left -= len(data)
            yield {"kind": "content"}, data
    yield {"kind": "tree-end", "entries": entries}, None
    for finding in findings.values():
        note(f"note: {printable(finding)}")


def show_contents(contents: Contents, *, encrypted: bool, size: int, as_json: bool) -> None:
    """Show what is in a backup."""
    about = contents.about
    assert about is not None
    if as_json:
        say_json(_to_map(contents, about) | {"encrypted": encrypted, "file_bytes": size})
        return
    statistics = "with" if about.statistics else "without"
    say(
        f"backup of {printable(about.node)}, {_when(about)}, database {printable(_text(about.database))} "
        f"({about.encoding}, PostgreSQL {about.server // 10000}), profile {printable(about.profile)}, "
        f"{statistics} statistics{', encrypted' if encrypted else ''}"
    )
    for table in contents.tables:
        say(f"  {printable(table.label):40} {table.rows:>12,} rows  {amount(table.size):>12}")
    for tree in contents.trees:
        held = f"{tree.files:>12,} files {amount(tree.size):>12}" if tree.present else "not there"
        say(f"  {printable(tree.root):40} {held}")
    say(f"whole: {contents.rows:,} rows, {contents.files:,} files, {amount(size)}")


def _to_map(contents: Contents, about: About) -> dict[str, Any]:
    return {
        "node": about.node, "made": _when(about), "profile": about.profile, "profile_digest": about.profile_digest,
        "statistics": about.statistics, "database": _text(about.database), "encoding": about.encoding,
        "server": about.server, "software": about.software,
        "tables": [{"table": table.label, "rows": table.rows, "bytes": table.size} for table in contents.tables],
        "trees": [
            {"root": tree.root, "present": tree.present, "files": tree.files, "directories": tree.directories,
             "bytes": tree.size}
            for tree in contents.trees
        ],
        "rows": contents.rows, "files": contents.files, "bytes": contents.size,
    }  # fmt: skip


def _when(about: About) -> str:
    return datetime.fromtimestamp(about.made_us / 1e6, UTC).isoformat(timespec="seconds")


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
