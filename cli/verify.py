"""`pmgcm verify`: are rows and files the same on all nodes? Says what differs where, and has it put right."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgpack
import typer

from cli.console import CommandFailedError, note, printable, say, say_json
from pmgsync.core.comparisons import (
    Difference,
    Row,
    Sum,
    compare_rows,
    compare_trees,
    differing_chunks,
    in_groups,
    lasting,
)
from pmgsync.core.filenames import show
from pmgsync.core.manifests import Entry, unpack_changes
from pmgsync.core.trees import Tree, trees_of
from pmgsync.errors import PmgsyncError, ProtocolError

if TYPE_CHECKING:
    from pmgsync.config import NodeConfig
    from pmgsync.core.membership import ClusterDocument
    from pmgsync.core.profile import Profile
    from pmgsync.wire.link import BrokerLink

IN_STEP_S = 60.0
"""So long it may take until all nodes have applied what was committed."""
LOOKS = 5
"""What differs is looked at so often, until two looks agree."""
PAUSE_S = 3.0
"""Between two looks at files: what was under way has arrived then."""
QUIET_LOOKS = 3
"""Status, a second apart, in which nothing is being fetched any more."""
SHOWN = 20
ROWS_AT_ONCE = 20_000
"""Of one table and node, so many rows are looked at together."""
ENOUGH = 1000
"""Of a table that differs in so many rows, no more are looked for: all of it is fetched anyway."""
DEFAULT_SHARE = 50


@dataclass
class Verified:
    """What was compared, and what differs.

    Attributes:
        rows, chunks, names: of each table that differs the rows, the chunks they are in, and schema and name.
        files: differences by tree.
        problems: what could not be compared, in sentences.
    """

    tables: int = 0
    compared_rows: int = 0
    trees: int = 0
    compared_files: int = 0
    rows: dict[str, list[Difference]] = field(default_factory=dict)
    chunks: dict[str, list[int]] = field(default_factory=dict)
    names: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    files: dict[str, list[Difference]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """True when everything was compared, and nothing differs."""
        return not (self.rows or self.files or self.problems)

    def to_map(self) -> dict[str, Any]:
        """Return the map of `--json` (README.md)."""
        rows = [
            {"table": table, "chunks": self.chunks[table], "differences": [_map(each, "key") for each in found]}
            for table, found in self.rows.items()
        ]
        files = [
            {"tree": tree, "differences": [_map(each, "name") for each in found]} for tree, found in self.files.items()
        ]
        return {
            "same": self.same, "tables": self.tables, "rows": self.compared_rows, "trees": self.trees,
            "files": self.compared_files, "differing_tables": rows, "differing_trees": files, "problems": self.problems,
        }  # fmt: skip


def verify(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have what differs fetched from whoever answers for it")
    ] = False,
    share: Annotated[
        int, typer.Option(min=1, max=100, metavar="PERCENT", help="Of the time, so much is spent reading")
    ] = DEFAULT_SHARE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (contract: README.md)")] = False,
) -> None:
    """Compare rows and files on all nodes. Exit code 1 when something differs (with --repair: still differs)."""
    from cli.local_node import load, member_broker
    from pmgsync.core.signed import SignedDocument
    from pmgsync.profile_file import load_profile

    config = load(context)
    profile = load_profile(config.profile)
    with member_broker(config) as link:
        _, parts = link.request({"op": "document"})
        document = SignedDocument.unpack(parts[0]).document
        verifying = _Verifying(config, link, document, profile, share)
        found = verifying.compare()
        if repair and (found.rows or found.files):
            _show(found)
            verifying.repair(found)
            found = verifying.compare()
    if as_json:
        say_json(found.to_map())
    else:
        _show(found)
    if not found.same:
        raise CommandFailedError


class _Verifying:
    """One run, over one session with the local broker."""

    def __init__(
        self, config: NodeConfig, link: BrokerLink, document: ClusterDocument, profile: Profile, share: int
    ) -> None:
        self._config = config
        self._link = link
        self._document = document
        self._profile = profile
        self._share = share

    def compare(self) -> Verified:
        """Compare everything."""
        found = Verified()
        holders = sorted(member.cid for member in self._document.members if member.role != "witness")
        try:
            self._compare_rows(found, holders)
        except PmgsyncError as error:
            found.problems.append(f"the rows could not be compared: {error}")
        for tree in trees_of(self._profile, self._document).values():
            try:
                self._compare_tree(found, tree, holders)
            except PmgsyncError as error:
                found.problems.append(f"{tree.name} could not be compared: {error}")
        return found

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _compare_rows(self, found: Verified, holders: list[int]) -> None:
        tables = self._unpacked(self._document.master, "rows.tables", {})
        for number, (schema, name, chunks, estimate) in enumerate(tables, 1):
            label = f"{_text(schema)}.{_text(name)}"
            note(f"comparing {printable(label)} ({number} of {len(tables)}, about {estimate} rows)")
            try:
                differences = self._table_differences(found, (schema, name), chunks, holders)
            except PmgsyncError as error:
                found.problems.append(f"{label} could not be compared: {error}")
                continue
            if differences:
                found.rows[label], found.names[label] = differences, (schema, name)
                found.chunks[label] = sorted({_chunk(each.key, chunks) for each in differences})

    def _table_differences(
        self, found: Verified, name: tuple[bytes, bytes], chunks: int, holders: list[int]
    ) -> list[Difference]:
        args = {"table": list(name), "chunks": chunks}
        answers = self._sums(args, holders)
        found.tables += 1
        found.compared_rows += sum(count for count, _ in answers[self._document.master].values())
        suspicious = differing_chunks(answers)
        if not suspicious:
            return []
        # Each node was read at a moment of its own: what is under way must be told from what is wrong.
        self._in_step()
        answers = self._sums(args, holders)
        lasted: list[Difference] = []
        for group in in_groups(sorted({*suspicious} & {*differing_chunks(answers)}), answers, ROWS_AT_ONCE):
            lasted += self._lasting_rows(args, group, holders, name)
            if len(lasted) >= ENOUGH:
                break
        return lasted

    def _sums(self, args: Mapping[str, Any], holders: list[int]) -> dict[int, dict[int, Sum]]:
        answers: dict[int, dict[int, Sum]] = {}
        for cid in holders:
            sums = self._unpacked(cid, "rows.sums", {**args, "share": self._share})
            answers[cid] = {chunk: (count, int(total)) for chunk, count, total in sums}
        return answers

    def _lasting_rows(
        self, args: Mapping[str, Any], chunks: list[int], holders: list[int], name: tuple[bytes, bytes]
    ) -> list[Difference]:
        rule = self._profile.rule_for(_text(name[0]), _text(name[1]))
        assert rule is not None
        before: list[Difference] | None = None
        lasted: list[Difference] = []
        for _ in range(LOOKS):
            self._in_step()
            answers: dict[int, dict[bytes, Row]] = {}
            for cid in holders:
                rows = self._unpacked(cid, "rows.keys", {**args, "wanted": chunks})
                answers[cid] = {key: (digest, owner) for key, digest, owner in rows}
            now = compare_rows(rule, answers, master=self._document.master, members=self._document.cids)
            lasted = lasting(before, now) if before is not None else []
            if not now or (before is not None and lasted == sorted(now)):
                break
            before = now
        return lasted

    def _in_step(self) -> None:
        """Wait until every node has applied what was committed anywhere: the position that is compared at."""
        from cli.wait import await_everyone

        behind, _ = await_everyone(self._config, time.monotonic() + IN_STEP_S)
        if behind:
            who = ", ".join(sorted({f"node {each.cid} is behind node {each.origin}" for each in behind}))
            raise ProtocolError(f"not all nodes are in step ({who})")

    # -- files --------------------------------------------------------------------------------------------------------

    def _compare_tree(self, found: Verified, tree: Tree, holders: list[int]) -> None:
        note(f"comparing {printable(tree.name)}")
        found.trees += 1
        differences, count = self._tree_differences(tree, holders, None)
        found.compared_files += count
        if not differences:
            return
        names = sorted({each.key for each in differences})
        time.sleep(PAUSE_S)
        again, _ = self._tree_differences(tree, holders, names)
        if lasted := lasting(differences, again):
            found.files[tree.name] = lasted

    def _tree_differences(
        self, tree: Tree, holders: list[int], names: Collection[bytes] | None
    ) -> tuple[list[Difference], int]:
        args: dict[str, Any] = {"tree": tree.name, "share": self._share}
        if names is not None:
            args["names"] = list(names)
        answers = {cid: self._entries(cid, args) for cid in holders}
        right = {name: entry for name, entry in answers.pop(tree.owner, {}).items() if entry is not None}
        files = sum(entry.kind == "f" for entry in right.values())
        return compare_trees(tree.owner, right, answers, config=tree.is_config, gone=tree.gone), files

    def _entries(self, cid: int, args: Mapping[str, Any]) -> dict[bytes, Entry | None]:
        found: dict[bytes, Entry | None] = {}
        for message, parts in self._link.call("files.verify", args, target=cid):
            if message["op"] == "data":
                found.update(change for part in parts if part for change in unpack_changes(part))
        return found

    # -- repair -------------------------------------------------------------------------------------------------------

    def repair(self, found: Verified) -> None:
        """Have every node that has something wrong fetch it, and wait until it has."""
        wanted: dict[tuple[int, int], list[str]] = {}
        for label, differences in found.rows.items():
            for pair in sorted({(each.cid, each.source) for each in differences}):
                wanted.setdefault(pair, []).append(label)
        for (cid, source), labels in wanted.items():
            note(f"node {cid} fetches {printable(', '.join(labels))} from node {source}")
            tables = [list(found.names[label]) for label in labels]
            self._run(cid, "rows.repair", {"tables": tables, "origin": source})
        for tree, differences in found.files.items():
            for cid in sorted({each.cid for each in differences}):
                names = [each.key for each in differences if each.cid == cid]
                note(f"node {cid} fetches {len(names)} files of {printable(tree)}")
                self._run(cid, "files.repair", {"tree": tree, "names": names})
        self._await_repair()

    def _await_repair(self) -> None:
        from cli.local_node import read_status

        deadline, quiet = time.monotonic() + IN_STEP_S, 0
        while time.monotonic() < deadline:
            time.sleep(1.0)
            nodes = read_status(self._link)["nodes"]
            stale = any(alert["kind"] in {"stale", "resync"} for node in nodes for alert in node["alerts"])
            behind = any(tree["behind"] for node in nodes for tree in node["trees"])
            # A worker that has just begun anew says nothing for a moment.
            quiet = 0 if stale or behind or any(node["state"] != "A" for node in nodes) else quiet + 1
            if quiet == QUIET_LOOKS:
                return
        note("not everything that was to be fetched has arrived yet")

    # -- calls --------------------------------------------------------------------------------------------------------

    def _run(self, cid: int, method: str, args: Mapping[str, Any]) -> None:
        for _ in self._link.call(method, args, target=cid):
            pass

    def _unpacked(self, cid: int, method: str, args: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = []
        for message, parts in self._link.call(method, args, target=cid):
            if message["op"] == "data":
                for part in filter(None, parts):
                    found += msgpack.unpackb(part, raw=False)
        return found


def _show(found: Verified) -> None:
    for label, differences in found.rows.items():
        say(f"{printable(label)}: {_count(differences)} in chunks {', '.join(map(str, found.chunks[label][:SHOWN]))}")
        _show_all(differences)
    for tree, differences in found.files.items():
        say(f"{printable(tree)}: {_count(differences)}")
        _show_all(differences)
    for problem in found.problems:
        say(printable(problem))
    if found.same:
        say(
            f"the same on all nodes: {found.tables} tables with {found.compared_rows} rows, "
            f"{found.trees} trees with {found.compared_files} files"
        )


def _show_all(differences: Iterable[Difference]) -> None:
    shown = list(differences)
    for each in shown[:SHOWN]:
        say(f"  {printable(show(each.key))} {each.kind} on node {each.cid}, node {each.source} has it right")
    if len(shown) > SHOWN:
        say(f"  and {len(shown) - SHOWN} more")


def _count(differences: Collection[Difference]) -> str:
    return "1 difference" if len(differences) == 1 else f"{len(differences)} differences"


def _map(difference: Difference, key: str) -> dict[str, Any]:
    return {key: show(difference.key), "cid": difference.cid, "source": difference.source, "kind": difference.kind}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _chunk(key: bytes, chunks: int) -> int:
    """Return the chunk of a row as `pmgsync.postgres.copy.checksums` forms it."""
    return int(hashlib.md5(key, usedforsecurity=False).hexdigest()[:7], 16) % chunks
