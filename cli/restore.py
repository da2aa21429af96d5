"""`pmgcm restore`: puts a backup in place of this node's tables and configuration files; for a node in no cluster."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.backup import show_contents
from cli.console import confirm, note, printable, say
from pmgsync.core.backups import Contents, Record, file_entry
from pmgsync.core.findings import Finding, raise_for
from pmgsync.errors import DamagedFileError, MembershipError, PmgsyncError

if TYPE_CHECKING:
    from cli.backup_file import BackupFile
    from pmgsync.config import NodeConfig
    from pmgsync.core.profile import FileTree, Profile
    from pmgsync.files.archive import Archived

REPLACED = "replaced"
"""Below the state directory: what a restore has put another file in place of."""


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup that `pmgcm backup` has written")],
    passphrase_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line is the backup's passphrase")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before anything is replaced")] = False,
) -> None:
    """Restore a backup on a node that is in no cluster. The whole file is proved before anything is touched."""
    from cli.backup_file import BackupFile, known_passphrase
    from cli.local_node import cluster_defined, load
    from cli.services import stopped
    from pmgsync.profile_file import load_profile

    config = load(context)
    profile = load_profile(config.profile)
    if cluster_defined(config):
        raise MembershipError(
            "this node is in a cluster, whose other nodes would keep what they have",
            hint='restore on a node that is in no cluster, then `pmgcm create` there; README.md, "When nodes are lost"',
        )
    with BackupFile(file, known_passphrase(passphrase_file)) as backup:
        contents = backup.check()
        show_contents(contents, encrypted=backup.encrypted, size=backup.size, as_json=False)
        trees = _check(config, profile, contents)
        if not yes:
            confirm("Replace all of that?")
        with stopped(profile.services, config.state_dir):
            _Restoring(config, profile, backup, contents, trees).run()


def _check(config: NodeConfig, profile: Profile, contents: Contents) -> dict[str, FileTree]:
    """Say what would be replaced, and return the rules of the trees in the backup, by root.

    Raises:
        PreflightError: with everything that stands against it.
    """
    from pmgsync.postgres.copy.backup_restore import compare_backup

    about = contents.about
    assert about is not None
    found = compare_backup(config.dsn, profile, contents)
    trees = {rule.root: rule for rule in profile.files if rule.kind == "config"}
    if about.profile != profile.name:
        found.notes.append(f"the backup is of the profile {about.profile}, this node has {profile.name}")
    elif about.profile_digest != profile.digest:
        found.notes.append(f"the profile {profile.name} says something else than when the backup was made")
    unknown = [tree.root for tree in contents.trees if tree.root not in trees]
    found.problems += [
        (f"the profile has no tree {root}", f"name the profile {about.profile} in node.toml") for root in unknown
    ]
    raise_for([Finding("backup", ok=False, problem=problem, remedy=remedy) for problem, remedy in found.problems])
    for text in found.notes:
        note(f"note: {printable(text)}")
    for table in contents.tables:
        note(f"{printable(table.label)}: {found.rows[table.label]:,} rows are replaced by {table.rows:,}")
    for tree in contents.trees:
        if tree.present:
            note(f"{printable(str(config.root_of(trees[tree.root])))}: made to hold the backup's {tree.files:,} files")
        else:
            note(f"{printable(tree.root)}: was not there when the backup was made, and is left as it is")
    return trees


class _Restoring:
    """One restore, after everything that can be checked was."""

    def __init__(
        self, config: NodeConfig, profile: Profile, backup: BackupFile, contents: Contents, trees: dict[str, FileTree]
    ) -> None:
        self._config, self._profile = config, profile
        self._backup, self._contents, self._trees = backup, contents, trees
        self._kept = config.state_dir / REPLACED / time.strftime("restore-%Y%m%dT%H%M%S")
        self._again = Contents()

    def run(self) -> None:
        """Replace the tables in one transaction, then the files.

        Raises:
            PmgsyncError: when something was not replaced; says what was.
        """
        records = self._checked(self._backup.records())
        self._tables(records)
        say(f"restored: {self._contents.rows:,} rows in {len(self._contents.tables)} tables")
        try:
            self._files(records)
        except PmgsyncError as error:
            error.add_note("the tables are restored; the same command again does the rest")
            raise

    def _checked(self, records: Iterator[Record]) -> Iterator[Record]:
        """Pass on what was proved before, and only that: the file may have been exchanged meanwhile."""
        for record, attachment in records:
            self._again.take(record, attachment)
            yield record, attachment
        if self._again != self._contents:
            raise DamagedFileError("the backup was changed while it was read")

    def _tables(self, records: Iterator[Record]) -> None:
        from contextlib import closing

        from cli.progress import SnapshotProgress
        from pmgsync.postgres.copy.backup_restore import BackupRestore

        total = sum(table.size for table in self._contents.tables)
        with closing(BackupRestore(self._config.dsn, self._profile, self._contents)) as restoring:
            with SnapshotProgress("restore") as progress:
                for record, attachment in records:
                    if record["kind"] == "sequences":
                        break
                    if record["kind"] != "backup":
                        restoring.feed(record, attachment)
                        progress.show(restoring.bytes, restoring.rows, total)
            before, now = self._contents, self._again
            if (now.about, now.tables, now.sequences) != (before.about, before.tables, before.sequences):
                raise DamagedFileError("the backup was changed while it was read")
            restoring.finish()

    def _files(self, records: Iterator[Record]) -> None:
        from pmgsync.files.archive import restore_tree

        for record, _ in records:
            if record["kind"] != "tree":
                continue
            items = _archived(records)
            if not record["present"]:
                for _ in items:
                    pass
                continue
            rule = self._trees[record["root"]]
            path = self._config.root_of(rule)
            done = restore_tree(rule, path, items, keep_in=self._kept / path.relative_to("/"), exact=True)
            say(f"restored: {printable(str(path))}, {len(done.changed)} files and directories changed")
            for text in done.left_out:
                note(f"note: {printable(text)}")
        if self._kept.exists():
            note(f"what was replaced is kept in {self._kept}")


def _archived(records: Iterator[Record]) -> Iterator[Archived]:
    """Yield the entries of the open tree, and take its end."""
    from pmgsync.files.archive import Archived

    for record, attachment in records:
        if record["kind"] == "tree-end":
            return
        name, entry = file_entry(attachment or b"")
        content = _Content(records, entry.size)
        yield Archived(name, entry, content if entry.kind == "f" else None)  # type: ignore[arg-type]
        content.skip()


class _Content(io.RawIOBase):
    """The content of one file, read from the records that follow it."""

    def __init__(self, records: Iterator[Record], size: int) -> None:
        super().__init__()
        self._records = records
        self._left = size
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most so many, b"" at the end."""
        if not self._rest and self._left:
            _, attachment = next(self._records)
            self._rest = attachment or b""
            self._left -= len(self._rest)
        found, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        return found

    def skip(self) -> None:
        """Leave out what was not read."""
        while self.read():
            pass
