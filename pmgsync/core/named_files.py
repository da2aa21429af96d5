"""Files that rows name: whose tree such a file is in, and how long a row waits for one. Pure: no clock, no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from pmgsync.core.changes import Inserted, Unread, key_reader
from pmgsync.core.filenames import Selection, check_name
from pmgsync.core.pgoutput import Insert, Relation, RowChange, Value
from pmgsync.core.profile import DEFAULT_SCHEMA, FileTree, Profile
from pmgsync.core.trees import Tree
from pmgsync.errors import ProtocolError

Naming = Mapping[tuple[bytes, bytes], Mapping[bytes, FileTree]]
"""By schema and name of a table: its columns that name files, and the spool whose root the names begin at."""
SHARE = 0.1
"""After a file did not come, rows of the chain wait for this share of the time at most."""


class NamedFile(NamedTuple):
    """A file that a new row names, as the row has it: its path below the root of a spool."""

    rule: FileTree
    path: bytes


class Files(Protocol):
    """The files that rows name, on this node. Times are of the monotonic clock."""

    def missing(self, named: Sequence[NamedFile], received: float) -> list[NamedFile]:
        """Return which files are to be waited for now, for rows that came here at `received`."""

    def wait(self, missing: Sequence[NamedFile], received: float) -> None:
        """Return when files are here, or rows go on without them; raises TransientApplyError when cancelled."""

    def cancel(self) -> None:
        """End what is being waited for, from another thread."""


def naming_of(profile: Profile) -> Naming:
    """Return which columns of a profile's tables name files."""
    found: dict[tuple[bytes, bytes], dict[bytes, FileTree]] = {}
    for rule in profile.files:
        for table, column in rule.named_in:
            found.setdefault((DEFAULT_SCHEMA.encode(), table.encode()), {})[column.encode()] = rule
    return found


def named_in(naming: Naming, change: tuple[Relation, RowChange] | Unread) -> Iterator[NamedFile]:
    """Yield the files that new rows name.

    Raises:
        ProtocolError: when a row is malformed, as far as it is read.
    """
    relation = change[0]
    columns = naming.get((relation.namespace, relation.name))
    if columns is None:
        return
    for place, column in enumerate(relation.columns):
        tree = columns.get(column.name)
        values: Iterable[Value] = ()
        if tree is None:
            continue
        if isinstance(change, Inserted):
            values = map(key_reader((place,)), change.messages)
        elif not isinstance(change, Unread) and isinstance(change[1], Insert):
            values = (change[1].new[place],)
        yield from (NamedFile(tree, value) for value in values if isinstance(value, bytes) and value)


def is_expected(file: NamedFile, trees: Iterable[Tree], origin: int) -> bool:
    """True when a file comes from the node that wrote its row; others come when they come, or never.

    A row from before there was a cluster names a file outside all trees.

    Args:
        trees: of the cluster.
        origin: CID of the node that wrote the row.
    """
    for tree in trees:
        inside = tree.below.encode("utf-8", "surrogateescape") + b"/"
        if tree.rule == file.rule and tree.owner == origin and file.path.startswith(inside):
            try:
                name = check_name(file.path.removeprefix(inside))
            except ProtocolError:
                return False
            return Selection(tree.rule.include, tree.rule.exclude).selects(name)
    return False


class Patience:
    """Until when the rows of one chain wait for their files.

    A row waits for `limit_s` from when it came to this node: so what comes in the meantime does not add up, and a node
    that was away is not kept from its rows until gigabytes of files have come. Once a file did not come in that time,
    more of them may never come (their owner has deleted them since), so the next wait begins at nothing and may grow by
    a tenth of the time that passes.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._failed_at: float | None = None

    def until(self, now: float, received: float) -> float:
        """Return the time at which a row that came at `received` goes on in any case."""
        longest_s = self._limit_s
        if self._failed_at is not None:
            longest_s = min(longest_s, SHARE * (now - self._failed_at))
        return min(received + self._limit_s, now + longest_s)

    def failed(self, now: float) -> None:
        """Note that a row went on without its file."""
        self._failed_at = now
